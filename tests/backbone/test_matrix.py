"""One contract over every variant of every family: what the judge reads and what the sampler gives are the stock
pipeline's own. What is checked stands in `prism.commands.checks`.

`EXEMPT` lists what a variant is let off, with the reason. What was measured is printed, a line a variant, at the end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from tests import tiny
from tests.planted import at_step, guided, planted
from tests.zoo import MEASURED, VARIANTS
from torch import Tensor

import prism
from prism.backbone import Backbone
from prism.backbone.arguments import normalised
from prism.commands import checks
from prism.commands import subject as subjects
from prism.errors import PrismError
from prism.judge import Judge
from prism.sampling.plan import Workload
from prism.sampling.strategies import Early

# (check, variant) -> why the variant is let off.
NOISE = (
    "its given frame gets noise anew at each call, other noise outside; `{}_clean`, without it, is held to the check"
)
EXEMPT: dict[tuple[str, str], str] = {
    ("encodes_once", "bare_module"): "it has no text encoder",
    ("tap_inside_and_outside", "ltx_condition"): NOISE.format("ltx_condition"),
    ("tap_inside_and_outside", "cosmos1_v2w"): NOISE.format("cosmos1_v2w"),
    ("conditional_rows", "wan22_a14b_t2v_low"): "the other denoiser's steps have moved all rows before its first call",
    ("looks_ahead", "kandinsky5_nabla"): "as kandinsky5_t2v, on a grid of 512 cells",
}

# Variants whose first frame is given.
GIVEN = {"wan22_5b_i2v", "hunyuan_i2v", "kandinsky5_i2v", "ltx_i2v", "sana_video_i2v", "cosmos2"}
GIVEN |= {"skyreels_v2_df_i2v", "hunyuan_i2v_true_cfg", "ltx_condition", "ltx_condition_clean", "cosmos1_v2w"}
GIVEN |= {"cosmos1_v2w_clean", "cosmos25_image", "sana_wm", "ltx2_i2v", "ltx2_condition"}

# Variants whose scheduler does not tell what the denoiser predicts.
UNTOLD = {
    "helios",
    "sana_wm",
    "sd15",
    "skyreels_v2_df",
    "skyreels_v2_df_i2v",
    "skyreels_v2_df_fps",
    "opensora",
    "bare_module",
}

STEPS = {"latte": 6}  # with fewer its scheduler begins far below pure noise

READS = {"wan22_a14b_t2v_low": "transformer_2"}  # the denoiser that is read, where it is not the first


@dataclass
class Subject(subjects.Subject):
    """A variant's pipeline and what a plain call of it gives, by seed."""

    name: str = ""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Subject:
    """Of the module, so that variants come one after another: each is built once, and one is in memory at a time."""
    pipe, call = VARIANTS[request.param]()
    backbone = Backbone(pipe, READS.get(request.param))
    if "num_inference_steps" in call:  # two cuts need 3, and a multistep solver, two denoisers and `strength` 4
        plain = "Euler" in type(pipe.scheduler).__name__ and "strength" not in call and len(backbone.denoisers) == 1
        few = 3 if plain else 4
        call["num_inference_steps"] = min(STEPS.get(request.param, few), call["num_inference_steps"])
    return Subject(backbone, call, (tiny.PROMPT, tiny.OTHER_PROMPT), name=request.param)


@pytest.fixture
def subject(request: pytest.FixtureRequest, variant: Subject) -> Subject:
    check = request.node.originalname.removeprefix("test_matrix_")
    if (check, variant.name) in EXEMPT:
        MEASURED.setdefault(variant.name, {})[f"let off {check}"] = EXEMPT[check, variant.name]
        pytest.skip(EXEMPT[check, variant.name])
    return variant


def note(subject: Subject, **measured: Any) -> None:
    MEASURED.setdefault(subject.name, {}).update(measured)


def test_matrix_grid(subject: Subject) -> None:
    note(subject, **checks.grid(subject))
    conditioning = subject.backbone.condition(subject.prompts(1), **subject.call)
    grid = subject.backbone.tokens(subject.latents(), conditioning, subject.backbone.t_range[1], 1).grid
    if subject.backbone.family.sampling_rate:
        assert grid[1] > 1 if subject.name == "audioldm_2" else grid[0] > 4 and grid[1:] == (1, 1)
    else:
        assert grid[2] > grid[1] > 1
    assert (conditioning.given is not None) == (subject.name in GIVEN)


def test_matrix_early_exit(subject: Subject) -> None:
    note(subject, **checks.early_exit(subject))
    assert not any(block._forward_hooks for block in subject.backbone.blocks)


def test_matrix_clock(subject: Subject) -> None:
    note(subject, **checks.clock(subject))


def test_matrix_vae(subject: Subject) -> None:
    note(subject, **checks.vae(subject))


def test_matrix_conditional_rows(subject: Subject) -> None:
    note(subject, **checks.conditional_rows(subject))


def test_matrix_tap_inside_and_outside(subject: Subject) -> None:
    note(subject, **checks.tap_inside_and_outside(subject))


def test_matrix_best_of_n(subject: Subject) -> None:
    note(subject, **checks.winner(subject))


def test_matrix_encodes_once(subject: Subject) -> None:
    """Every text and every conditioning image is encoded once, for all candidates, their drafts and the winner.

    Drafts need what cuts need and more: a call of another length.
    """
    backbone = Backbone(subject.pipe)  # one that has captured nothing yet
    judge, vae = Judge.untrained(backbone, dim=16), backbone.pipe.vae
    asked: list[tuple[Any, ...]] = []
    plain = vae.encode

    def keep(name: str, args: Any, kwargs: Any) -> None:
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        asked.append((name, len(values[0]), *((value.stride(), value.numpy().tobytes()) for value in values)))

    def encode(*args: Any, **kwargs: Any) -> Any:
        keep("vae", args, kwargs)
        return plain(*args, **kwargs)

    handles = [
        module.register_forward_pre_hook(lambda _m, args, kwargs, name=name: keep(name, args, kwargs), with_kwargs=True)
        for name, module in backbone.encoders.items()
    ]
    vae.encode = encode
    try:
        arguments = {"n": 2, "strategy": "draft", "num_draws": 1, "batch_size": 1, **subject.call}
        one_is_too_few = "strength" in subject.call or subject.name in ("mochi", "pixart_alpha")
        steps = 3 if one_is_too_few else 2
        arguments |= {"output_type": "latent", "num_inference_steps": steps, "draft_steps": steps - 1}
        ledger = prism.best_of_n(subject.pipe, judge, subject.prompts(1)[0], **arguments).ledger
        assert len(asked) == len(set(asked))
        assert ledger.vae_encodes == sum(rows for name, rows, *_ in asked if name == "vae")
        assert ledger.text_encodings == sum(rows for name, rows, *_ in asked if name.startswith("text"))
        assert ledger.text_encodings > 0 or not backbone.family.takes_prompts
    finally:
        del vae.encode
        for handle in handles:
            handle.remove()


def test_matrix_looks_ahead(subject: Subject) -> None:
    """What a denoiser that knows the answer predicts is that answer; the judge's best one wins, for the plan's rows."""
    backbone, name = subject.backbone, subject.name
    judge, prompt, step = Judge.untrained(backbone, dim=16), subject.prompts(1)[0], 2
    call = normalised({**subject.call, "num_inference_steps": 3, "output_type": "latent"})
    run: dict[str, Any] = {"n": 2, "schedule": [(step, 1)], "look": "ahead", "num_draws": 1, **call}
    if name in UNTOLD:
        with pytest.raises(PrismError, match='take look="now"'):
            prism.best_of_n(subject.pipe, judge, prompt, **run)
        return
    conditioning = backbone.condition([prompt], **call)
    text = backbone.denoiser_call(conditioning.arguments).text[:1]  # AnimateDiff repeats it for each frame
    asked: list[Tensor] = []
    score = judge.score_clean

    def keep(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append(latents)
        return score(latents, *args, **kwargs)

    judge.score_clean = keep
    keeps_norm = name.startswith(("qwen_image", "lumina2", "ltx2", "ace_step"))  # its guidance is not linear
    apart = 0.0 if keeps_norm else 0.3
    with planted(backbone, text, apart) as calls:
        result = prism.best_of_n(subject.pipe, judge, prompt, **run)
    predicted, (noisy, *answers) = torch.cat(asked), at_step(calls, step)
    clean = guided(backbone, call, *answers)
    given = conditioning.given
    if given is not None and name == "kandinsky5_i2v":  # it fits the frame to those that follow
        clean = torch.cat([subject.pipe.normalize_first_frame(row[None]) for row in torch.where(given, noisy, clean)])
    elif given is not None:
        given = given.expand(clean.shape)
        if not name.startswith("ltx_condition"):  # it shows the frame with other noise at each step
            frame, finished = predicted[result.index][given[0]], result.latents[0][given[0]]
            assert (frame - finished).abs().max() < 0.01
        clean = torch.where(given, predicted, clean)
    error = float((predicted - clean).abs().max())
    note(subject, prediction_error=error)
    assert error < 5e-6
    assert (predicted[0] - predicted[1]).abs().max() > 0.1

    draws = torch.Generator().manual_seed(random.Random("judge 0").randrange(2**62))
    seeds = {"seeds": [0, 1]} if backbone.draws_conditions(call) else {}
    expected, _ = score(clean.float(), [prompt] * 2, result.scores[0]["t"], 1, draws, **call, **seeds)
    assert torch.allclose(torch.tensor(list(result.scores[0]["scores"].values())).T, expected, atol=1e-4)
    assert result.index == int(expected[:, judge.dimensions.index("overall")].argmax())

    steps = backbone.steps({**call, **backbone.batch([prompt], [0], call)})
    load = Workload.of(backbone, call, 2, judge.tap, steps)
    plan = Early([(step, 1)], look="ahead", num_draws=1).settled(load)
    assert result.ledger.denoiser_rows == pytest.approx(plan.rows(load))
    counted = sum(len(each.clean) for each in calls) + 2 * judge.tap / backbone.num_blocks
    assert result.ledger.denoiser_rows == pytest.approx(counted)


@cache
def _foreign() -> Any:
    return tiny.wan(num_layers=2)


def test_matrix_heads(subject: Subject, tmp_path: Any) -> None:
    """A head comes back from its folder with the same scores, and is refused by a foreign backbone."""
    backbone = subject.backbone
    judge = Judge.untrained(backbone, dim=16)
    judge.save_pretrained(tmp_path / "head", trained_on={"store": "none"})
    again = Judge.from_pretrained(tmp_path / "head", subject.pipe)
    latents, t = subject.latents(), sum(backbone.t_range) / 2
    tokens = backbone.tokens(latents, backbone.condition(subject.prompts(1), **subject.call), t, judge.tap)
    assert again.tap == judge.tap
    assert torch.equal(again.score_tokens(tokens), judge.score_tokens(tokens))
    foreign = _foreign()
    with pytest.raises(PrismError, match=r"load the backbone it was trained on|has no denoiser 'transformer_2'"):
        Judge.from_pretrained(tmp_path / "head", foreign)
