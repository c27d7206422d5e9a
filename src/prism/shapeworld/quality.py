"""How good a generator is by the referee: mean scores, what is right how often, and how much the candidates of one
prompt differ.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from tqdm import tqdm

from prism import files, runs
from prism.backbone import Backbone
from prism.checks import SEEDS, number, whole
from prism.errors import PrismError

from . import CALL, grammar, recipe, referee
from .assets import write_manifest
from .candidates import candidate_seed

BATCH = 32
GROUPS = (*grammar.KINDS, "all")


@torch.no_grad()
def measure(
    pipe: WanPipeline,
    prompts: Sequence[str],
    per_prompt: int = 2,
    seed: int = 0,
    call: Mapping[str, Any] = CALL,
) -> dict[str, Any]:
    """Sample `per_prompt` videos of each prompt and referee them.

    Returns, for the prompts of one thing, of two ("single", "pair"), and for "all": `videos`; `mean`: mean of VQ, MQ,
    TA and overall; `right`: share of videos in which colour, shape, motion, ... are the prompt's; `within_over_total`:
    pooled standard deviation of the overall score within a prompt, over that of all videos."""
    backbone, videos, work = Backbone(pipe), [], [(p, i) for p in prompts for i in range(per_prompt)]
    for start in tqdm(range(0, len(work), BATCH), disable=None, desc="quality", unit=f"x{BATCH} videos"):
        chunk = work[start : start + BATCH]
        generators = [torch.Generator().manual_seed(candidate_seed(seed, p, i)) for p, i in chunk]
        latents = pipe([p for p, _ in chunk], generator=generators, output_type="latent", **call).frames
        videos += [backbone.decode(rows).cpu() for rows in latents.split(8)]
    seen, names = torch.cat(videos), [p for p, _ in work]
    scores, right = referee.batch(seen, names), referee.correct(seen, names)
    found: dict[str, Any] = {"seed": seed, "per_prompt": per_prompt, "call": dict(call)}
    for group in GROUPS:
        rows = [row for row, p in enumerate(names) if (scene := grammar.parse(p)) and group in (scene.kind, "all")]
        if rows:
            overall = scores["overall"][rows].numpy().reshape(-1, per_prompt)
            within = float(np.sqrt(overall.var(1, ddof=1).mean())) if per_prompt > 1 else None
            total = float(overall.std(ddof=1))
            found[group] = {
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
    return found


def snapshot(out: Path, step: int) -> WanPipeline:
    """The generator of the training run in `out` as it was after `step` steps (their averaged weights)."""
    path, settings = out / "transformer" / f"step-{step}.safetensors", out / "transformer" / "config.json"
    if not path.is_file():
        raise PrismError(f"The run in {out} kept no weights of step {step} ({path} is missing).")
    config, weights = files.read_json(settings), files.load_safetensors(path)
    transformer, encoder = recipe.build_transformer(config["layers"], config["heads"]), recipe.build_text_encoder()
    for name, module in (("transformer", transformer), ("text_encoder", encoder)):
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        missing, strange = module.load_state_dict(own, strict=False)
        tied = {"encoder.embed_tokens.weight"}  # one tensor under two names
        if strange or set(missing) - tied:
            raise PrismError(f"The file {path} does not hold this model's weights; it belongs to another version.")
    return recipe.assemble(recipe.load_vae(out / "vae"), transformer, encoder)


def run(
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
    """Measure an embedded backbone, or snapshots of a training run, and write `quality.json` to `out`; returns it.

    `prompts` are drawn of each kind (one thing, two). Raises PrismError for a backbone that does not exist."""
    from . import BACKBONES, pipeline

    if backbone not in BACKBONES and not (Path(backbone) / "transformer").is_dir():
        names = ", ".join(BACKBONES)
        raise PrismError(f"The --backbone {backbone} is none of {names} and no training run's folder; name another.")
    if split not in grammar.SPLITS:
        raise PrismError(f'The --split is "{split}"; choose one of {", ".join(grammar.SPLITS)}.')
    whole("--prompts", prompts, 1, 100_000)
    whole("--per-prompt", per_prompt, 1, 10_000)
    whole("--seed", seed, 0, SEEDS)
    for kept in steps:
        whole("--step", kept, 0, 10**9)
    if guidance_scale is not None:
        number("--guidance-scale", guidance_scale, -100, 1000)
    call = CALL if guidance_scale is None else {**CALL, "guidance_scale": guidance_scale}
    chosen = [prompt for kind in grammar.KINDS for prompt in grammar.prompts(split, prompts, kind)]
    with runs.new(out, overwrite, "quality") as folder:
        found = []
        wanted: Sequence[int | None] = steps or (None,)
        for step in wanted:
            pipe = pipeline(backbone) if backbone in BACKBONES else _of_run(Path(backbone), step)
            found.append({"backbone": backbone, "step": step, **measure(pipe, chosen, per_prompt, seed, call)})
            print(_line(found[-1]))
        files.write_json(folder / "quality.json", {"split": split, "measured": found})
    return {"split": split, "measured": found}


def _of_run(out: Path, step: int | None) -> WanPipeline:
    if step is not None:
        return snapshot(out, step)
    parts = out / "transformer"
    if not (parts / "transformer").is_dir():
        raise PrismError(f"The training in {parts} is not finished; name a --step whose weights it kept.")
    return recipe.assemble(recipe.load_vae(out / "vae"), *recipe.load_generator(parts))


def _line(found: Mapping[str, Any]) -> str:
    parts = []
    for group in GROUPS:
        if group in found:
            right = ", ".join(f"{name} {share:.0%}" for name, share in found[group]["right"].items())
            means = " ".join(f"{name} {mean:.2f}" for name, mean in found[group]["mean"].items())
            parts.append(f"{group}: {means}; right: {right}; within/total {found[group]['within_over_total'] or 0:.2f}")
    return f"step {found['step'] or 'last'}: " + " | ".join(parts)


def save_weaker(run: Path, folder: Path, step: int | None = None, overwrite: bool = False) -> None:
    """Write what `shapeworld.pipeline` needs of a weaker backbone: transformer and text encoder of a training run, at
    the end or at a step whose weights it kept, with settings and log beside them.
    """
    source = run / "transformer"
    pipe = _of_run(run, step)
    with runs.new(folder, overwrite, "weaker") as temporary:
        recipe.save_weaker(pipe, temporary)
        files.write_json(temporary / "training.json", {"step": step, **files.read_json(source / "config.json")})
        shutil.copy(source / "log.jsonl", temporary / "log.jsonl")
        write_manifest(temporary)
