"""One contract over every variant of every family: what the judge reads and what the sampler gives are the stock
pipeline's own.

`EXEMPT` lists what a variant is let off, with the reason. What was measured is printed, a line a variant, at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin
from PIL import ImageOps
from tests import tiny
from tests.zoo import MEASURED, VARIANTS
from torch import Tensor

import prism
from prism.backbone import Backbone, layout
from prism.backbone.conditioning import by_name, noisy_name
from prism.errors import PrismError
from prism.judge import Judge

# (check, variant) -> why the variant is let off.
NOISE = (
    "its given frame gets noise anew at each call, other noise outside; `{}_clean`, without it, is held to the check"
)
EXEMPT: dict[tuple[str, str], str] = {
    ("encodes_once", "bare_module"): "it has no text encoder",
    ("tap_inside_and_outside", "ltx_condition"): NOISE.format("ltx_condition"),
    ("tap_inside_and_outside", "cosmos1_v2w"): NOISE.format("cosmos1_v2w"),
    ("conditional_rows", "wan22_a14b_t2v_low"): "the other denoiser's steps have moved all rows before its first call",
}

# Variants whose first frame is given.
GIVEN = {"wan22_5b_i2v", "hunyuan_i2v", "kandinsky5_i2v", "ltx_i2v", "sana_video_i2v", "cosmos2"}
GIVEN |= {"skyreels_v2_df_i2v", "hunyuan_i2v_true_cfg", "ltx_condition", "ltx_condition_clean", "cosmos1_v2w"}
GIVEN |= {"cosmos1_v2w_clean", "cosmos25_image"}

READS = {"wan22_a14b_t2v_low": "transformer_2"}  # the denoiser that is read, where it is not the first
SCHEDULES = {"wan22_a14b_t2v_low": [(4, 2), (5, 1)]}  # cuts on its steps


@dataclass
class Subject:
    """A variant's pipeline and what a plain call of it gives, by seed."""

    name: str
    pipe: Any
    call: dict[str, Any]
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone:
        if "backbone" not in self.kept:
            self.kept["backbone"] = Backbone(self.pipe, READS.get(self.name))
        return self.kept["backbone"]

    def plain(self, seed: int = 0, prompt: str = tiny.PROMPT, **changes: Any) -> Any:
        """The stock call's first output."""
        call = {**self.call, **changes, "generator": torch.Generator("cpu").manual_seed(seed)}
        if self.backbone.family.prompts:
            call["prompt"] = prompt
        return self.pipe(**call)[0]

    def latents(self, seed: int = 0) -> Tensor:
        """What the loop carries at its end: what the call gives, except where that is repacked or lacks a frame."""
        key = ("latents", seed)
        if key not in self.kept:
            last: dict[str, Tensor] = {}
            watch = {"callback_on_step_end": lambda *args: last.update(args[-1]) or {}}
            if not self.backbone.takes("callback_on_step_end"):
                watch = {}
            latents = self.backbone.main(self.plain(seed, output_type="latent", **watch))
            if latents.shape[1:] != self.backbone.condition(self.prompts(1), **self.call).shape:
                latents = self.backbone.main(last["latents"])
            self.kept[key] = latents
        return self.kept[key]

    def prompts(self, count: int) -> list[str]:
        return ([tiny.PROMPT, tiny.OTHER_PROMPT] if self.backbone.family.prompts else ["", ""])[:count]

    @contextmanager
    def calls(self) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
        """The denoiser calls made meanwhile: arguments, and tokens after the default tap with all rows."""
        seen: list[tuple[dict[str, Any], Tensor]] = []
        backbone, latest = self.backbone, {}

        def before(module: Any, args: Any, kwargs: Any) -> None:
            latest.clear()
            latest.update(by_name(module, args, kwargs))
            name = noisy_name(latest, backbone.family)
            latest[name] = latest[name].clone()  # some pipelines write their next latents into it

        def after(_module: Any, _args: Any, output: Any) -> None:
            batch = len(latest[noisy_name(latest, backbone.family)])
            seen.append((dict(latest), backbone.family.states(output, latest, batch).clone()))

        handles = [d.register_forward_pre_hook(before, with_kwargs=True) for d in backbone.denoisers]
        handles.append(backbone.blocks[backbone.default_tap - 1].register_forward_hook(after))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


_SUBJECTS: dict[str, Subject] = {}


@pytest.fixture(params=VARIANTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    name = request.param
    check = request.node.originalname.removeprefix("test_matrix_")
    if (check, name) in EXEMPT:
        MEASURED.setdefault(name, {})[f"let off {check}"] = EXEMPT[check, name]
        pytest.skip(EXEMPT[check, name])
    if name not in _SUBJECTS:
        _SUBJECTS.clear()  # variants come one after another: one in memory at a time
        pipe, call = VARIANTS[name]()
        _SUBJECTS[name] = Subject(name, pipe, call)
    return _SUBJECTS[name]


def note(subject: Subject, **measured: Any) -> None:
    MEASURED.setdefault(subject.name, {}).update(measured)


def difference(found: Any, expected: Any) -> float:
    """The largest difference relative to the largest value."""
    found, expected = (torch.as_tensor(np.asarray(value)).double() for value in (found, expected))
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def test_matrix_grid(subject: Subject) -> None:
    """Changing one latent cell changes most the token of its place on the grid."""
    backbone, family = subject.backbone, subject.backbone.family
    conditioning = backbone.condition(subject.prompts(1), **subject.call)
    shape = subject.latents().shape
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    t = sum(backbone.t_range) / 2
    plain = backbone.tokens(latents, conditioning, t, 1)
    grid = plain.grid
    assert plain.visual.shape == (1, int(np.prod(grid)), backbone.widths[0])
    assert grid[2] > grid[1] > 1
    cells = layout.unpack(latents, family.layout, grid)
    sizes = [extent // tokens for extent, tokens in zip(cells.shape[2:], grid)]
    given = 0 if conditioning.given is None else 1  # a condition covers the first frame: noise there is not looked at
    rng = np.random.default_rng(0)
    places = [(given, 0, 0), (grid[0] - 1, grid[1] - 1, grid[2] - 1)]
    places += [tuple(int(rng.integers(given if i == 0 else 0, n)) for i, n in enumerate(grid)) for _ in range(4)]
    for place in places:
        changed = cells.clone()
        where = tuple(slice(p * size, (p + 1) * size) for p, size in zip(place, sizes))
        changed[(slice(None), slice(None), *where)] += 5
        moved = backbone.tokens(layout.pack(changed, family.layout), conditioning, t, 1).visual - plain.visual
        found = int(moved.norm(dim=-1)[0].argmax())
        assert np.unravel_index(found, grid) == place
    assert (conditioning.given is not None) == (subject.name in GIVEN)
    if subject.name in GIVEN:  # whatever a latent holds there, the denoiser is shown the image
        changed = cells.clone()
        changed[:, :, 0] += 5
        moved = backbone.tokens(layout.pack(changed, family.layout), conditioning, t, 1)
        assert torch.equal(moved.visual, plain.visual)
    note(subject, grid="x".join(map(str, grid)), tap=f"{backbone.default_tap}/{backbone.num_blocks}")


def test_matrix_early_exit(subject: Subject) -> None:
    """Stopping after a block gives the same states to the bit, and later blocks are not called."""
    backbone = subject.backbone
    conditioning = backbone.condition(subject.prompts(1), **subject.call)
    latents, t, tap = subject.latents(), sum(backbone.t_range) / 2, backbone.default_tap
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i + 1)) for i, b in enumerate(backbone.blocks)]
    try:
        stopped = backbone.tokens(latents, conditioning, t, tap)
        assert ran == list(range(1, tap + 1))
        whole = backbone.tokens(latents, conditioning, t, tap, stop=False)
        assert ran[tap:] == list(range(1, backbone.num_blocks + 1))
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(stopped.visual, whole.visual)
    assert not any(block._forward_hooks for block in backbone.blocks)


def test_matrix_clock(subject: Subject) -> None:
    """At every timestep of a stock run the level found is the run's own: its timestep comes back, and a re-noised
    latent is what the scheduler makes of it."""
    backbone, family = subject.backbone, subject.backbone.family
    scheduler = backbone.pipe.scheduler
    with subject.calls() as seen:
        subject.plain(output_type="latent")
    steps = [float(arguments[family.timestep_argument].max()) for arguments, _ in seen]
    levels = [family.t_of(scheduler, step) for step in steps]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > 0.8 * backbone.t_range[1]
    z, noise = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    for step, t in zip(steps, levels):
        alpha, sigma, timestep = family.level(scheduler, torch.tensor([t]))
        assert float(timestep) == pytest.approx(step, rel=1e-4, abs=1e-3)
        if t == 0:  # exactly clean by our definition, nearly so by some schedulers'
            continue
        expected = _scheduler_noise(family, scheduler, z, noise, step)
        table = getattr(scheduler, "timesteps", steps)
        whole = isinstance(table, Tensor) and not table.is_floating_point()  # up to a thousandth is cut off a level
        atol = 1.1e-3 * float((noise - z).abs().max()) if whole else 3e-3
        torch.testing.assert_close(alpha * z + sigma * noise, expected, atol=atol, rtol=1e-3)


def _scheduler_noise(family: Any, scheduler: Any, z: Tensor, noise: Tensor, step: float) -> Tensor:
    """What a denoiser called with `step` is given of z, by the formula of the scheduler's class."""
    if family.clock == "ddpm":
        return scheduler.add_noise(z, noise, torch.tensor([int(step)]))
    if family.clock == "euler":
        place = int((scheduler.timesteps - step).abs().argmin())
        return (z + scheduler.sigmas[place] * noise) / (scheduler.sigmas[place] ** 2 + 1) ** 0.5
    if family.clock == "edm":
        sigma = float(np.exp(4 * step))
        data = float(scheduler.config.get("sigma_data", 1.0))
        return (z + sigma * noise) / (sigma**2 + data**2) ** 0.5
    own, place = _at(scheduler, 1000 * step / family.timestep_of_one)
    if place is not None and not scheduler.config.get("invert_sigmas"):  # with which diffusers noises the wrong way
        if hasattr(own, "scale_noise"):
            return own.scale_noise(z, own.timesteps[place : place + 1], noise)
        return own.add_noise(z, noise, own.timesteps[place : place + 1])
    share = step / family.timestep_of_one
    share = 1 - share if family.clock == "rising_flow" else share
    return (1 - share) * z + share * noise


def _at(scheduler: Any, step: float) -> tuple[Any, int | None]:
    """The scheduler as if no step had been made, and the place of a timestep in its table, which alone it can noise
    to; None for what is not in it (Cosmos passes sigmas), or is none of diffusers'."""
    if not isinstance(scheduler, SchedulerMixin):
        return scheduler, None
    own = copy.deepcopy(scheduler)
    own._step_index = own._begin_index = None
    place = int((own.timesteps - step).abs().argmin())
    return own, place if abs(float(own.timesteps[place]) - step) < 1e-2 else None


def test_matrix_vae(subject: Subject) -> None:
    """What the stock call gives its VAE is our denormalised latents, its frames are our decoded ones, and
    normalising inverts denormalising."""
    backbone, family = subject.backbone, subject.backbone.family
    latents, given = subject.latents(), []
    plain = backbone.pipe.vae.decode

    def decode(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(values.clone())
        return plain(values, *args, **kwargs)

    backbone.pipe.vae.decode = decode
    try:
        video = subject.plain(output_type="np")
    finally:
        del backbone.pipe.vae.decode
    grid = backbone.tokens(latents, backbone.condition(subject.prompts(1), **subject.call), backbone.t_range[1], 1).grid
    cells = layout.unpack(latents, family.layout, grid)
    assert torch.equal(layout.pack(cells, family.layout), latents)
    ours = family.denormalise(backbone.pipe, cells)
    theirs = torch.cat(given)
    ours = ours.transpose(1, 2).flatten(0, 1) if family.vae_frames else ours
    frames = theirs.shape[2] if theirs.ndim == 5 else None  # CogVideoX 1.5 drops what it had padded in front
    assert difference(ours[:, :, -frames:] if frames else ours, theirs) < 1e-5
    back = family.normalise(backbone.pipe, family.denormalise(backbone.pipe, cells))
    torch.testing.assert_close(back, cells, atol=1e-4, rtol=1e-4)
    if frames and family.layout == "BTCHW":
        latents = latents[:, -frames:]
    decoded = backbone.decode(latents, grid)
    video = np.asarray(video)
    rounded = 1 / 254 if getattr(subject.pipe, "safety_checker", None) else 0  # to the bytes that a checker is shown
    assert difference(decoded, video[:, None] if video.ndim == 4 else video) < 1e-4 + rounded
    encoded = backbone.encode(decoded)
    assert encoded.shape == subject.latents().shape
    note(subject, latents="x".join(map(str, latents.shape[1:])))


def test_matrix_conditional_rows(subject: Subject) -> None:
    """Changing the positive prompt alone (the image, where there is none) changes the rows that are called conditional,
    and no others."""
    backbone = subject.backbone
    runs = []
    for prompt in (tiny.PROMPT, tiny.OTHER_PROMPT):
        changes = {}
        if not backbone.family.prompts and prompt == tiny.OTHER_PROMPT:
            changes["image"] = ImageOps.invert(subject.call["image"])
        with subject.calls() as seen:
            subject.plain(prompt=prompt, output_type="latent", **changes)
        runs.append(seen)
    calls = 2 if backbone.guided(subject.call) and backbone.family.cfg == "two_calls" else 1
    for index in range(calls):
        (one, states), (_, others) = runs[0][index], runs[1][index]
        groups = len(one[noisy_name(one, backbone.family)])
        assert groups == (2 if backbone.guided(subject.call) and backbone.family.cfg == "one_batch" else 1)
        moved = (states - others).abs().amax((1, 2)) > 1e-6
        conditional = backbone.family.conditional(groups, 1).start
        assert moved.tolist() == [index == 0 and group == conditional for group in range(groups)]
    if len(backbone.denoisers) == 1:
        assert len(runs[0]) == calls * subject.call["num_inference_steps"]
    note(subject, guidance=backbone.family.cfg if backbone.guided(subject.call) else "embedded")


def test_matrix_tap_inside_and_outside(subject: Subject) -> None:
    """Tokens of latents at their step equal what a plain hook sees inside the stock call.

    With the seed that conditioning is captured with: some pipelines sample an image's latents by it.
    """
    backbone, family = subject.backbone, subject.backbone.family
    with subject.calls() as seen:
        subject.plain(output_type="latent")
    low, high = backbone.t_range
    conditioning = backbone.condition(subject.prompts(1), **subject.call)
    two = backbone.guided(subject.call) and family.cfg == "two_calls"
    worst = 0.0
    for arguments, states in seen[:: 2 if two else 1]:
        t = family.t_of(backbone.pipe.scheduler, arguments[family.timestep_argument].max())
        if not low <= t <= high:
            continue
        noisy = arguments[noisy_name(arguments, family)]
        row = family.conditional(len(noisy), 1)
        latents = backbone.main(noisy[row])
        tokens = backbone.tokens(latents, conditioning, t, backbone.default_tap)
        worst = max(worst, difference(tokens.visual, states[row]))
    assert worst < 2e-5
    note(subject, tap_error=worst)


def test_matrix_best_of_n(subject: Subject) -> None:
    """The winner is the plain call's video for its seed, to the bit one by one, to float tolerance in a batch; and
    what is decoded is what a plain call decodes."""
    backbone = subject.backbone
    judge = Judge.untrained(backbone, dim=16)
    prompt = subject.prompts(1)[0]
    decoded = []
    plain = backbone.pipe.vae.decode

    def decode(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(len(values))
        return plain(values, *args, **kwargs)

    schedule, counts = SCHEDULES.get(subject.name, [(2, 2), (3, 1)]), []
    backbone.pipe.vae.decode = decode
    try:
        one = prism.best_of_n(
            subject.pipe, judge, prompt, n=3, schedule=schedule, batch_size=1, **{**subject.call, "output_type": "np"}
        )
        counts.append(sum(decoded))
        video = subject.plain(one.seed, output_type="np")
        counts.append(sum(decoded) - counts[0])
    finally:
        del backbone.pipe.vae.decode
    assert counts[0] == counts[1]  # one video
    assert np.array_equal(one.video, video[0])
    many = prism.best_of_n(
        subject.pipe, judge, prompt, n=3, schedule=schedule, batch_size=3, **{**subject.call, "output_type": "latent"}
    )
    assert many.seed == one.seed
    error = difference(many.video, subject.plain(many.seed, output_type="latent")[0])
    assert error < 1e-4
    for cut, other in zip(one.scores, many.scores):
        assert cut["candidates"] == other["candidates"]
        for name in judge.dimensions:
            assert cut["scores"][name] == pytest.approx(other["scores"][name], rel=1e-3, abs=1e-4)
    note(subject, one_by_one="to the bit", in_a_batch=error)


def test_matrix_encodes_once(subject: Subject) -> None:
    """Every text and every conditioning image is encoded once, for all candidates, their drafts and the winner."""
    backbone = Backbone(subject.pipe)  # one that has captured nothing yet
    judge, vae = Judge.untrained(backbone, dim=16), backbone.pipe.vae
    asked: list[tuple[Any, ...]] = []
    plain = vae.encode

    def keep(name: str, args: Any, kwargs: Any) -> None:
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        asked.append((name, len(values[0]), *(value.numpy().tobytes() for value in values)))

    def encode(*args: Any, **kwargs: Any) -> Any:
        keep("vae", args, kwargs)
        return plain(*args, **kwargs)

    handles = [
        module.register_forward_pre_hook(lambda _m, args, kwargs, name=name: keep(name, args, kwargs), with_kwargs=True)
        for name, module in backbone.encoders.items()
    ]
    vae.encode = encode
    try:
        for strategy in ("early", "draft"):
            asked.clear()
            arguments = {"n": 3, "strategy": strategy, "batch_size": 1, **subject.call, "output_type": "latent"}
            ledger = prism.best_of_n(subject.pipe, judge, subject.prompts(1)[0], **arguments).ledger
            assert len(asked) == len(set(asked))
            assert ledger.vae_encodes == sum(rows for name, rows, *_ in asked if name == "vae")
            assert ledger.text_encodings == sum(rows for name, rows, *_ in asked if name.startswith("text"))
            assert ledger.text_encodings > 0 or not backbone.family.prompts
    finally:
        del vae.encode
        for handle in handles:
            handle.remove()


def test_matrix_heads(subject: Subject, tmp_path: Any) -> None:
    """A head comes back from its folder with the same scores, and is refused by a foreign backbone."""
    backbone = subject.backbone
    judge = Judge.untrained(backbone, dim=16)
    judge.save_pretrained(tmp_path / "head", trained_on={"store": "none"})
    again = Judge.from_pretrained(tmp_path / "head", subject.pipe)
    latents, t = subject.latents(), sum(backbone.t_range) / 2
    prompts = subject.prompts(1)
    assert torch.equal(
        again.score(latents, prompts, t, **subject.call), judge.score(latents, prompts, t, **subject.call)
    )
    foreign = tiny.wan(num_layers=2)
    with pytest.raises(PrismError, match=r"load the backbone it was trained on|has no denoiser 'transformer_2'"):
        Judge.from_pretrained(tmp_path / "head", foreign)
