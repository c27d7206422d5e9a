"""Candidates sampled from the embedded generator and scored by the referee: their stores, and measured quality."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file
from tqdm import tqdm

from prism import files, runs
from prism.backbone import Backbone
from prism.backbone.fingerprint import VERSIONED
from prism.errors import SEEDS, PrismError, number, whole
from prism.preference import pairs_from_scores, write_store
from prism.sampling.trajectory import candidate_seed as candidate_seed
from prism.shapeworld import CALL, generator, grammar, referee
from prism.shapeworld.generator import write_manifest

SHIPPED = {"train": (750, 4), "validation": (40, 6), "test": (100, 4)}
"""Split -> (number of prompts, candidates per prompt) of the store that ships with the package."""
BATCH = 32  # videos per pipeline call


def parse_share(text: str) -> tuple[str, tuple[int, int]]:
    """Parse `train`, `train:200` or `train:200x6`: a split, a number of its prompts (all), candidates per prompt (8).

    Raises PrismError for another text."""
    match = re.fullmatch(rf"({'|'.join(grammar.SPLITS)})(?::(\d+)(?:x(\d+))?)?", text)
    if not match:
        raise PrismError(f'The --split "{text}" is not one of {", ".join(grammar.SPLITS)}, or like train:200x6.')
    name, prompts, per_prompt = match.groups()
    return name, (int(prompts or grammar.SPLITS[name]), int(per_prompt or 8))


def run(
    out: Path,
    splits: Mapping[str, tuple[int, int]] = SHIPPED,
    seed: int = 0,
    trajectories: bool = False,
    backbone: Backbone | None = None,
    overwrite: bool = False,
    command: str = "",
    share: tuple[int, int] = (0, 1),
) -> None:
    """Sample candidates of the first prompts of `splits` with `CALL`, and write a latent store to `out`.

    Parts are written to `<out>.parts`, from which a run that was killed continues.

    Args:
        splits: name -> (number of prompts, candidates per prompt).
        trajectories: store the states after each step but the last too, with their noise levels.
        share: (i, n) with n > 1 makes only the parts i, i + n, ..., so that n processes can work side by side; a run
            without it then joins the parts.

    Raises:
        PrismError: where another run's parts lie in `<out>.parts`, unless `overwrite`.
    """
    whole("--seed", seed, 0, SEEDS)
    for split, (prompts, per_prompt) in splits.items():
        whole(f"The prompts of --split {split}", prompts, 1, 10**7)
        whole(f"The candidates of --split {split}", per_prompt, 1, 10_000)
    runs.check(out, overwrite, "store")
    if backbone is None:
        from prism.shapeworld import pipeline

        backbone = Backbone(pipeline())
    work = [
        (split, p, candidate_seed(seed, p, i))
        for split, (prompts, per_prompt) in splits.items()
        for p in grammar.prompts(split, prompts)
        for i in range(per_prompt)
    ]
    call = dict(CALL)
    meta = {
        "command": command or f"prism shapeworld candidates --seed {seed}",
        "seed": seed,
        "call": call,
        "backbone": backbone.fingerprint(),
        "dimensions": list(referee.DIMENSIONS),
        "tie_margins": referee.TIE_MARGINS,
    }
    shares = {split: list(share) for split, share in splits.items()}
    identity = {**meta, "splits": shares, "trajectories": trajectories}
    changeable = [f"backbone.{name}" for name in VERSIONED]
    parts = runs.claim(
        runs.parts_of(out), identity, True, overwrite, name=runs.IDENTITY, changeable=changeable, shared=share[1] > 1
    )
    chunks = [work[start : start + BATCH] for start in range(0, len(work), BATCH)]
    done = []
    for index, chunk in enumerate(tqdm(chunks, disable=None, desc="candidates", unit=f"x{BATCH} videos")):
        if index % share[1] != share[0]:
            continue

        def make(path: Path, chunk: list[tuple[str, str, int]] = chunk) -> None:
            save_file(sample(backbone, call, chunk, trajectories), path)

        done.append(parts.piece(f"{index:05d}.safetensors", make, partial(_part, count=len(chunk))))
    if share[1] > 1:
        return
    joined = {name: torch.cat([part[name] for part in done]) for name in done[0]}
    columns: dict[str, Any] = {
        "video": [f"{split}-{s}" for split, _, s in work],
        "prompt": [prompt for _, prompt, _ in work],
        "seed": [s for _, _, s in work],
        "split": [split for split, _, _ in work],
    }
    columns |= {name: joined[f"score/{name}"].tolist() for name in referee.DIMENSIONS}
    videos = pa.table(columns)
    recorded = {name: joined[name] for name in ("states", "t")} if trajectories else None
    with runs.new(out, overwrite, "store") as folder:
        pairs = pairs_from_scores(videos, referee.TIE_MARGINS)
        write_store(folder, videos, joined["latents"], pairs, meta, recorded, eight_bits=True)
    parts.remove()


def _part(path: Path, count: int) -> dict[str, torch.Tensor]:
    """Load a part of `count` videos. Raises PrismError for a part that is damaged or has another size."""
    part = files.load_safetensors(path)
    sizes = {len(value) for value in part.values()}
    if sizes != {count}:
        raise PrismError(f"The file {path} holds {sorted(sizes)} videos where {count} are needed.")
    return part


def sample(
    backbone: Backbone, call: dict[str, Any], chunk: list[tuple[str, str, int]], trajectories: bool
) -> dict[str, torch.Tensor]:
    pipe, prompts = backbone.pipe, [prompt for _, prompt, _ in chunk]
    states, levels = [], []

    def record(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        sigma = float(pipe.scheduler.sigmas[step + 1])
        if sigma > 0:
            states.append(tensors["latents"].half())
            levels.append(1000 * sigma)
        return tensors

    latents = pipe(
        prompts,
        generator=[torch.Generator().manual_seed(seed) for _, _, seed in chunk],
        output_type="latent",
        callback_on_step_end=record if trajectories else None,
        **call,
    ).frames
    scores = [referee.batch(backbone.decode(rows).cpu(), names) for rows, names in _in_eights(latents, prompts)]
    part = {f"score/{name}": torch.cat([score[name] for score in scores]) for name in referee.DIMENSIONS}
    part["latents"] = latents.half().contiguous()
    if trajectories:
        part |= {"states": torch.stack(states, 1), "t": torch.tensor(levels).expand(len(chunk), -1).contiguous()}
    return part


def _in_eights(latents: torch.Tensor, prompts: list[str]) -> Iterator[tuple[torch.Tensor, list[str]]]:
    for start in range(0, len(prompts), 8):
        yield latents[start : start + 8], prompts[start : start + 8]


GROUPS = (*grammar.KINDS, "all")


@torch.no_grad()
def measure(
    pipe: WanPipeline,
    prompts: Sequence[str],
    per_prompt: int = 2,
    seed: int = 0,
    call: Mapping[str, Any] = CALL,
) -> dict[str, Any]:
    """Sample `per_prompt` videos per prompt and have the referee score them.

    Returns, for prompts with one thing ("single"), with two ("pair"), and for "all": `prompts`, `videos`: their
    numbers; `mean`: mean of VQ, MQ, TA and overall; `right`: share of videos in which colour, shape, motion, ... are
    those of the prompt; `within_sd`, `total_sd`: standard deviation of the overall score, pooled within prompts and of
    all videos; `within_over_total`: the former divided by the latter."""
    backbone, videos, work = Backbone(pipe), [], [(p, i) for p in prompts for i in range(per_prompt)]
    for start in tqdm(range(0, len(work), BATCH), disable=None, desc="quality", unit=f"x{BATCH} videos"):
        chunk = work[start : start + BATCH]
        generators = [torch.Generator().manual_seed(candidate_seed(seed, p, i)) for p, i in chunk]
        latents = pipe([p for p, _ in chunk], generator=generators, output_type="latent", **call).frames
        videos += [backbone.decode(rows).cpu() for rows in latents.split(8)]
    seen, names = torch.cat(videos), [p for p, _ in work]
    scores, right = referee.batch(seen, names), referee.correct(seen, names)
    measured: dict[str, Any] = {"seed": seed, "per_prompt": per_prompt, "call": dict(call)}
    for group in GROUPS:
        rows = [row for row, p in enumerate(names) if (scene := grammar.parse(p)) and group in (scene.kind, "all")]
        if rows:
            overall = scores["overall"][rows].numpy().reshape(-1, per_prompt)
            within = float(np.sqrt(overall.var(1, ddof=1).mean())) if per_prompt > 1 else None
            total = float(overall.std(ddof=1))
            measured[group] = {
                "prompts": len(rows) // per_prompt,
                "videos": len(rows),
                "mean": {name: float(scores[name][rows].mean()) for name in referee.DIMENSIONS},
                "right": {
                    name: float(values[rows][~values[rows].isnan()].mean())
                    for name, values in right.items()
                    if not values[rows].isnan().all()
                },
                "within_sd": within,
                "total_sd": total,
                "within_over_total": None if within is None else within / total,
            }
    return measured


def snapshot(out: Path, step: int) -> WanPipeline:
    """The generator of the training run in `out` after `step` steps, with the averaged (EMA) weights of that step."""
    path, settings = out / "transformer" / f"step-{step}.safetensors", out / "transformer" / "config.json"
    if not path.is_file():
        raise PrismError(f"The run in {out} kept no weights of step {step} ({path} is missing).")
    config, weights = files.read_json(settings), files.load_safetensors(path)
    transformer = generator.build_transformer(config["layers"], config["heads"])
    encoder = generator.build_text_encoder()
    for name, module in (("transformer", transformer), ("text_encoder", encoder)):
        state = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        missing, strange = module.load_state_dict(state, strict=False)
        tied = {"encoder.embed_tokens.weight"}  # one tensor under two names
        if strange or set(missing) - tied:
            raise PrismError(f"The file {path} does not hold this model's weights; it belongs to another version.")
    return generator.assemble(generator.load_vae(out / "vae"), transformer, encoder)


def quality(
    out: Path,
    backbone: str = "default",
    steps: Sequence[int] = (),
    prompts: int = 100,
    per_prompt: int = 2,
    split: str = "validation",
    guidance_scale: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure an embedded backbone, or snapshots of a training run; write `quality.json` to `out`, and return it.

    `prompts`: number of prompts of each kind (one thing, two things). Raises PrismError for an unknown backbone."""
    from prism.shapeworld import BACKBONES, pipeline

    if backbone not in BACKBONES and not (Path(backbone) / "transformer").is_dir():
        names = ", ".join(BACKBONES)
        raise PrismError(f"The --backbone {backbone} is none of {names} and no training run's folder; name another.")
    if split not in grammar.SPLITS:
        raise PrismError(f'The --split is "{split}"; choose one of {", ".join(grammar.SPLITS)}.')
    whole("--prompts", prompts, 1, 100_000)
    whole("--per-prompt", per_prompt, 1, 10_000)
    whole("--seed", seed, 0, SEEDS)
    for number_of_step in steps:
        whole("--step", number_of_step, 0, 10**9)
    if guidance_scale is not None:
        number("--guidance-scale", guidance_scale, -100, 1000)
    call = CALL if guidance_scale is None else {**CALL, "guidance_scale": guidance_scale}
    chosen = [prompt for kind in grammar.KINDS for prompt in grammar.prompts(split, prompts, kind)]
    with runs.new(out, overwrite, "quality") as folder:
        rows = []
        measured_steps: Sequence[int | None] = steps or (None,)
        for step in measured_steps:
            pipe = pipeline(backbone) if backbone in BACKBONES else _of_run(Path(backbone), step)
            rows.append({"backbone": backbone, "step": step, **measure(pipe, chosen, per_prompt, seed, call)})
            print(_line(rows[-1]))
        files.write_json(folder / "quality.json", {"split": split, "measured": rows})
    return {"split": split, "measured": rows}


def _of_run(out: Path, step: int | None) -> WanPipeline:
    if step is not None:
        return snapshot(out, step)
    parts = out / "transformer"
    if not (parts / "transformer").is_dir():
        raise PrismError(f"The training in {parts} is not finished; name a --step whose weights it kept.")
    return generator.assemble(generator.load_vae(out / "vae"), *generator.load_generator(parts))


def _line(row: Mapping[str, Any]) -> str:
    parts = []
    for group in GROUPS:
        if group in row:
            right = ", ".join(f"{name} {share:.0%}" for name, share in row[group]["right"].items())
            means = " ".join(f"{name} {mean:.2f}" for name, mean in row[group]["mean"].items())
            parts.append(f"{group}: {means}; right: {right}; within/total {row[group]['within_over_total'] or 0:.2f}")
    return f"step {row['step'] or 'last'}: " + " | ".join(parts)


def save_weaker(run: Path, folder: Path, step: int | None = None, overwrite: bool = False) -> None:
    """Write the files of a weaker backbone: transformer and text encoder of a training run, at its end or at a `step`
    whose weights it kept, and its settings.
    """
    source = run / "transformer"
    pipe = _of_run(run, step)
    with runs.new(folder, overwrite, "weaker") as temporary:
        generator.save_weaker(pipe, temporary)
        files.write_json(temporary / "training.json", {"step": step, **files.read_json(source / "config.json")})
        write_manifest(temporary)
