"""The pack's four nodes: schemas in ComfyUI's V3 form, and thin calls of the modules beside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io, ui

from prism.errors import PrismError
from prism.sampling import looks

from . import plans, preview
from .judge import LoadedJudge
from .sampling import LOOKS, Call, Candidate, Runs, ranked

CATEGORY = "PRISM"
JudgeType = io.Custom("PRISM_JUDGE")
ScoresType = io.Custom("PRISM_SCORES")


def _judges() -> Path:
    """The folder of judges beside ComfyUI's models."""
    return Path(folder_paths.models_dir) / "prism"


class LoadJudge(io.ComfyNode):
    """Reads a judge from its folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PRISMLoadJudge",
            display_name="PRISM Load Judge",
            category=CATEGORY,
            description="A judge that prism train wrote: it scores videos from the generator's own hidden states.",
            inputs=[
                io.String.Input(
                    "judge",
                    default="",
                    tooltip="The judge's folder, its name in models/prism, or its id on the Hub (user/name).",
                )
            ],
            outputs=[JudgeType.Output(display_name="judge")],
        )

    @classmethod
    def fingerprint_inputs(cls, judge: str) -> Any:
        """A judge's file is read again where it was written anew."""
        for folder in (Path(judge), _judges() / judge):
            for path in (folder / "config.json", folder / "head" / "config.json"):
                if judge and path.is_file():
                    return f"{path} {path.stat().st_mtime_ns}"
        return judge

    @classmethod
    def execute(cls, judge: str) -> io.NodeOutput:
        return io.NodeOutput(LoadedJudge(judge, _judges()))


class EarlyBestOfN(io.ComfyNode):
    """Many seeds are begun, the judge looks early, and the best goes on to its end."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PRISMEarlyBestOfN",
            display_name="PRISM Early Best-of-N",
            category=CATEGORY,
            description="Begins a video per seed, drops the worst after a few steps by the judge's scores and finishes "
            "the best one. Its latent is the one that KSampler gives for the winning seed.",
            inputs=[
                io.Model.Input("model"),
                JudgeType.Input("judge"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent", tooltip="One sample, as an empty latent of batch_size 1."),
                io.Int.Input("seed", default=0, min=0, max=plans.LARGEST, control_after_generate=True),
                io.Int.Input("candidates", default=8, min=1, max=plans.MOST, tooltip="Seeds from seed on."),
                io.Int.Input("steps", default=30, min=1, max=10000),
                io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="uni_pc"),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple"),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
                io.String.Input(
                    "plan",
                    default="",
                    tooltip='Cuts STEP:KEEP, as "5:1" or "3:4,6:1"; empty: one after a fifth of the steps; or a '
                    "plan.json of prism plan.",
                ),
                io.Combo.Input(
                    "look",
                    options=list(LOOKS),
                    default="now",
                    tooltip="What is judged at a cut: the latents as they stand, or the clean ones that the model "
                    "predicts, by both passes or the conditional one alone.",
                ),
                io.String.Input("rank_by", default="overall", tooltip="A dimension of the judge; empty: all alike."),
                io.String.Input(
                    "seeds", default="", optional=True, tooltip='Instead of seed and candidates: "3, 9, 12-15".'
                ),
                io.Float.Input(
                    "judge_at", default=700.0, min=1.0, max=1000.0, optional=True, tooltip="Noise level of looks ahead."
                ),
                io.Int.Input("num_draws", default=2, min=1, max=100, optional=True, tooltip="Noise of looks ahead."),
                io.Int.Input(
                    "end_at_step",
                    default=10000,
                    min=1,
                    max=10000,
                    optional=True,
                    tooltip="As KSampler (Advanced) has it, for models of two parts (Wan 2.2 A14B).",
                ),
                io.Boolean.Input("return_with_leftover_noise", default=False, optional=True),
                io.Vae.Input("vae", optional=True, tooltip="Colours of the strip are fitted on it, once."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                ScoresType.Output(display_name="scores"),
                io.Image.Output(display_name="strip"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        judge: LoadedJudge,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        seed: int,
        candidates: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        plan: str,
        look: str,
        rank_by: str,
        seeds: str = "",
        judge_at: float = 700.0,
        num_draws: int = 2,
        end_at_step: int = 10000,
        return_with_leftover_noise: bool = False,
        vae: Any = None,
    ) -> io.NodeOutput:
        numbers, weights = plans.seeds_of(seeds, seed, candidates), judge.weights(rank_by)
        last = min(steps, end_at_step)
        cuts = plans.early_plan(plan, len(numbers), last, look, judge_at, num_draws)
        call = Call(
            *(positive, negative, latent, steps, cfg, sampler_name, scheduler, denoise),
            *(last if last < steps else None, return_with_leftover_noise),
        )
        runs = Runs(model, judge, call, cuts.level, cuts.num_draws, numbers[0])
        everyone = [Candidate(number) for number in numbers]
        ended, samples = _searched(runs, everyone, cuts, weights)
        latent_format = model.get_model_object("latent_format")
        raw = [None if each.clean is None else latent_format.process_out(each.clean)[0] for each in ended]
        if not return_with_leftover_noise:
            raw[0] = samples[0]
        labels = [_label(candidate, place) for place, candidate in enumerate(ended, 1)]
        picture = preview.strip(list(zip(labels, raw)), preview.map_of(vae, latent_format))
        found = _report(runs, judge, ended, cuts, rank_by)
        kept = {
            name: value for name, value in latent.items() if not name.startswith("downscale_ratio")
        }  # of empty ones
        return io.NodeOutput({**kept, "samples": samples}, found, picture)


class ScoreLatent(io.ComfyNode):
    """Scores of finished latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PRISMScoreLatent",
            display_name="PRISM Score Latent",
            category=CATEGORY,
            description="Scores finished latents, one per sample of the batch: re-noised to a level, and read once per "
            "draw of the noise. No video is decoded.",
            inputs=[
                io.Model.Input("model"),
                JudgeType.Input("judge"),
                io.Conditioning.Input("positive"),
                io.Latent.Input("latent"),
                io.Float.Input(
                    "t", default=0.0, min=0.0, max=999.0, tooltip="Noise level; 0: where the judge judges best."
                ),
                io.Int.Input("num_draws", default=4, min=1, max=100),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1),
            ],
            outputs=[ScoresType.Output(display_name="scores"), io.Float.Output(display_name="overall")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        judge: LoadedJudge,
        positive: Any,
        latent: dict[str, Any],
        t: float,
        num_draws: int,
        seed: int,
    ) -> io.NodeOutput:
        level = t or judge.default_level()
        runs = Runs(model, judge, num_draws=num_draws, seed=seed)
        rows = []
        for number, sample in enumerate(latent["samples"].split(1)):
            draws = torch.stack(runs.judged(sample, positive, level))
            errors = draws.std(0) / num_draws**0.5 if num_draws > 1 else torch.full_like(draws[0], torch.nan)
            scores = dict(zip(judge.dimensions, draws.mean(0).tolist()))
            rows.append({"sample": number, "t": level, "scores": scores, "errors": errors.tolist()})
        weights = judge.weights("overall")
        for row in rows:
            row["overall"] = sum(weight * row["scores"][name] for name, weight in weights.items())
            if not math.isfinite(row["overall"]):
                raise PrismError(
                    f"Sample {row['sample']} of the latent has no finite score: it holds NaN or infinity, or the model "
                    "gives them; take another dtype for the model."
                )
        rows.sort(key=lambda row: -row["overall"])
        for place, row in enumerate(rows, 1):
            row |= {"rank": place, "fate": "scored"}
        found = {"kind": "score", "judge": judge.name, "dimensions": list(judge.dimensions), "candidates": rows}
        return io.NodeOutput(found, rows[0]["overall"])


class SeedReport(io.ComfyNode):
    """Scores as a table."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PRISMSeedReport",
            display_name="PRISM Seed Report",
            category=CATEGORY,
            description="The scores as a table, as JSON, and the best seed for a KSampler.",
            inputs=[ScoresType.Input("scores")],
            outputs=[
                io.String.Output(display_name="table"),
                io.String.Output(display_name="json"),
                io.Int.Output(display_name="best"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, scores: dict[str, Any]) -> io.NodeOutput:
        table = plans.report(scores)
        best = scores["candidates"][0]
        number = best["seed"] if scores["kind"] == "best-of-n" else best["sample"]
        return io.NodeOutput(table, plans.as_json(scores), number, ui=ui.PreviewText(table))


def _searched(
    runs: Runs, everyone: list[Candidate], plan: Any, weights: dict[str, float]
) -> tuple[list[Candidate], torch.Tensor]:
    """All candidates, best first, and the winner's latents."""
    alive, dropped = everyone, []
    bar = comfy.utils.ProgressBar(1 + sum(_looked_at(plan.schedule, len(everyone))))
    every = looks.per_cut(plan.look, [step for step, _ in plan.schedule], ())
    for (step, keep), look in zip(plan.schedule, every):
        if keep == len(alive):
            continue
        for candidate in alive:
            runs.look(candidate, step, look)
            bar.update(1)
        alive = ranked(alive, weights)
        for candidate in alive[keep:]:
            candidate.forget()
            candidate.dropped_at = step
        alive, dropped = alive[:keep], [*alive[keep:], *dropped]
    samples = runs.finish(alive[0])
    bar.update(1)
    return [*alive, *dropped], samples


def _looked_at(schedule: Any, n: int) -> Iterator[int]:
    """The number of candidates that each cut looks at."""
    for _, keep in schedule:
        yield n if keep < n else 0
        n = keep


def _label(candidate: Candidate, place: int) -> str:
    seen = candidate.looks[-1]["scores"] if candidate.looks else {}
    scores = "  ".join(f"{name} {value:+.2f}" for name, value in seen.items())
    fate = "finished" if candidate.dropped_at is None else f"dropped at step {candidate.dropped_at}"
    return f"{place}. seed {candidate.seed}  {scores}  {fate}"


def _report(runs: Runs, judge: LoadedJudge, ended: list[Candidate], plan: Any, rank_by: str) -> dict[str, Any]:
    """What PRISM Seed Report shows, as JSON."""
    rows, every = [], looks.per_cut(plan.look, [step for step, _ in plan.schedule], ())
    for place, candidate in enumerate(ended, 1):
        last = candidate.looks[-1] if candidate.looks else None
        rows.append(
            {
                "rank": place,
                "seed": candidate.seed,
                "t": last["t"] if last else None,
                "scores": last["scores"] if last else dict.fromkeys(judge.dimensions),
                "looks": candidate.looks,
                "fate": "finished" if candidate.dropped_at is None else f"dropped at step {candidate.dropped_at}",
            }
        )
    return {
        **{"kind": "best-of-n", "judge": judge.name, "dimensions": list(judge.dimensions), "seed": ended[0].seed},
        **{"plan": plans.in_words(plan.schedule), "look": looks.in_words(every), "rank_by": rank_by or "all alike"},
        **{"rows": runs.reader.rows, "rows_of_one": runs.rows_of_one(), "candidates": rows},
    }


class PrismExtension(ComfyExtension):
    """The pack, as ComfyUI asks for it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadJudge, EarlyBestOfN, ScoreLatent, SeedReport]
