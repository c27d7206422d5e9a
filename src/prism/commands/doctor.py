"""`prism doctor`: report on a machine and a backbone, or check a user's family on a pipeline."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from prism.commands.options import Models, option
from prism.errors import PrismError, whole

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
PROMPT = "a red circle moves right"
PROMPTS = 800  # training prompts of the study's judges, with four videos each (docs/study.md)
MANY = 256  # the largest number of candidates per batch that is reported
Line = tuple[str, str]
OF_THE_CALL = "call.json beside the pipeline, else its own"


@dataclass(frozen=True)
class Examined(Models):
    """The model, by default the embedded one."""

    backbone: Annotated[tyro.conf.Positional[str | None], option("[BACKBONE]", "the embedded ShapeWorld model")] = None
    """Diffusers pipeline: a folder, or an id on the Hub."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a video."""

    height: Annotated[int | None, option(default=OF_THE_CALL)] = None
    """Height in pixels."""
    width: Annotated[int | None, option(default=OF_THE_CALL)] = None
    """Width in pixels."""
    num_frames: Annotated[int | None, option(default=OF_THE_CALL)] = None
    """Frames."""


@dataclass(frozen=True)
class Doctor:
    """Say what a machine and a backbone are good for, before anything long is started.

    Versions, devices, the kind of pipeline and its taps, how many rows fit, what Best-of-N would cost, and whether an
    early cut would save anything.

    With --family: check that a row of facts of your own fits a pipeline, one line per check; exit code 1 where a check
    does not hold. Choose small sizes.
    """

    models: Examined = Examined()
    n: int = 8
    """Candidates."""
    schedule: Annotated[str | None, option("STEP:KEEP,...", "one, at a fifth")] = None
    """Cuts."""
    steps: Annotated[int | None, option(default="the pipeline's own")] = None
    """Steps of a run."""
    run: Annotated[bool, option(default="")] = True
    """Run no step of the denoiser to time it."""
    family: Annotated[Path | None, option("FILE", "")] = None
    """Check the `family` that this Python file defines on the pipeline. The file is run: it is your own code."""
    sizes: Sizes = Sizes()

    @property
    def changes(self) -> dict[str, int]:
        """The arguments of the pipeline's call that options change."""
        arguments = {"num_inference_steps": self.steps, **asdict(self.sizes)}
        return {name: value for name, value in arguments.items() if value is not None}

    def main(self) -> int:
        """Print the lines; return 1 where a check of a family does not hold."""
        from rich.console import Console

        from prism.backbone.arguments import FRAMES, PIXELS, STEPS

        limits = {"num_inference_steps": STEPS, "height": PIXELS, "width": PIXELS, "num_frames": FRAMES}
        for name, size in self.changes.items():
            flag = "--steps" if name == "num_inference_steps" else f"--{name.replace('_', '-')}"
            whole(flag, size, *limits[name])
        console = Console(highlight=False)
        if self.family is not None:
            from prism.commands.checks import run_all
            from prism.commands.subject import with_own_facts

            models = self.models
            checked = run_all(with_own_facts(models.backbone, self.family, models.device, models.dtype, **self.changes))
            for name, holds, sentence in checked:
                console.print(f"  {'holds' if holds else 'FAILS':8}{name:22}{sentence}", soft_wrap=True, markup=False)
            return int(not all(holds for _, holds, _ in checked))
        for title, lines in run(self):
            console.print(f"[bold]{title}[/bold]")
            for name, value in lines:
                console.print(f"  {name:24}{value}", soft_wrap=True, markup=False)
        return 0


def run(config: Doctor) -> list[tuple[str, list[Line]]]:
    """The report: sections of lines, each a name and a value. Raises PrismError for an unsupported pipeline."""
    from prism.loading import load_backbone
    from prism.sampling import plan as schedules

    whole("--n", config.n, 1, 10_000)
    backbone, call, name = load_backbone(config.models.backbone, config.models.device, config.models.dtype)
    call |= config.changes
    cuts = schedules.parse(config.schedule) if config.schedule else None
    seconds, memory = None, 0
    trouble = "--no-run"
    if config.run:
        try:
            seconds, memory = _measured(backbone, call)
        except (PrismError, RuntimeError) as error:
            used = {key: call.get(key) or backbone.default(key) for key in asdict(config.sizes)}
            tried = ", ".join(f"{key} {size}" for key, size in used.items() if size)
            reason = str(error).strip().splitlines()[0][:300]
            trouble = f"{reason}{f' (tried {tried}; choose another, as --height and --width)' if tried else ''}"
    tap, judge = _judge(backbone, config.models.backbone)
    return [
        ("machine", _machine(backbone)),
        ("backbone", [*_backbone(backbone, name), ("judge", judge)]),
        ("one step", _step(backbone, tap, seconds, memory, trouble, backbone.guided(call))),
        (f"best of {config.n}", _costs(backbone, tap, call, config.n, cuts, seconds)),
    ]


def _machine(backbone: Any) -> list[Line]:
    import torch

    import prism

    lines = [("prism", prism.__version__), ("python", platform.python_version())]
    lines += [(name, version(name)) for name in PACKAGES]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        lines.append((f"cuda:{number}", f"{torch.cuda.get_device_name(number)}, {_size(free)} of {_size(total)} free"))
    threads = torch.get_num_threads()
    lines.append(("cpu", f"{threads} thread{'' if threads == 1 else 's'}, {_size(_free(torch.device('cpu')))} free"))
    return [*lines, ("runs on", str(backbone.device))]


def _backbone(backbone: Any, name: str) -> list[Line]:
    family, low_high = backbone.family, backbone.t_range
    widths = sorted(set(backbone.widths))
    whose = f"the {'sound' if family.sampling_rate else 'video'}'s"
    reads = (
        "" if low_high == (0.0, 1000.0) else f"; {backbone.reads}, used for t from {low_high[0]:g} to {low_high[1]:g}"
    )
    guidance = {"two_calls": "two denoiser calls a step", "one_batch": "one denoiser call of twice the rows"}[
        family.cfg
    ]
    return [
        ("name", name),
        ("pipeline", f"{type(backbone.pipe).__name__} ({family.models})"),
        (
            "denoiser",
            f"{type(backbone.denoiser).__name__}, {backbone.num_parameters:,} weights, {backbone.dtype}{reads}",
        ),
        ("taps", f"1 to {backbone.num_blocks}, {' or '.join(map(str, widths))} wide; default {backbone.default_tap}"),
        ("a judge by itself", _standalone(backbone)),
        ("text tokens", f"none: the head reads {whose}" if family.text_embedder is None else f"beside {whose}"),
        ("guidance", f"{guidance}, where {family.guidance} turns it on"),
    ]


def _judge(backbone: Any, folder: str | None) -> tuple[int, str]:
    """The block after which the judge reads, and the judge: the one that ships, or how to train one."""
    from prism import files, shapeworld

    if folder is not None:
        advice = "none ships for this model; train one (prism train) on labelled pairs; "
        advice += f"the toy world's took about {PROMPTS} prompts"
        return backbone.default_tap, advice
    config = files.read_json(shapeworld.asset_folder("head") / "config.json")
    tap = max(member["tap"] for member in config.get("members", [config]))
    return tap, f"the one that ships, after block {tap}"


def _standalone(backbone: Any) -> str:
    """The part of the denoiser that a judge loads if it does not sample, in words."""
    try:
        lists = backbone.family.first_blocks(backbone.denoiser, backbone.default_tap)
    except PrismError as error:
        return str(error)
    blocks = [block for part, count in lists for block in part[count:]]
    later = {id(value) for block in blocks for value in (*block.parameters(), *block.buffers())}
    sizes = {id(value): value.nbytes for value in (*backbone.denoiser.parameters(), *backbone.denoiser.buffers())}
    needed = sum(size for key, size in sizes.items() if key not in later)
    return f"loads {_size(needed)} of the denoiser's {_size(sum(sizes.values()))}, up to the default tap"


def _measured(backbone: Any, call: dict[str, Any]) -> tuple[float, int]:
    """Seconds that a denoiser row takes, and the bytes that one more row takes (0 where the device does not say)."""
    import torch
    from PIL import Image

    from prism.backbone import control

    if backbone.takes("image") and "image" not in call:
        size = [call.get(name) or backbone.default(name) or 512 for name in ("width", "height")]
        call["image"] = Image.new("RGB", size, "gray")
    prompts = [PROMPT if backbone.family.takes_prompts else ""]
    conditioning = backbone.condition(prompts, **call)[0]
    latents = torch.zeros((1, *conditioning.shape), dtype=conditioning.dtype, device=backbone.device)
    t = torch.full((1,), sum(backbone.t_range) / 2, device=latents.device)
    _, _, timestep = backbone.family.level(backbone.pipe.scheduler, t)

    def denoise(rows: int) -> None:
        some = conditioning[[0] * rows]
        noisy = latents.expand(rows, *latents.shape[1:])
        with torch.no_grad(), backbone.held():
            backbone.denoiser(**control.arguments(backbone, some, noisy, timestep.expand(rows)))

    most = 1 if backbone.family.batch_size_one else 2
    peaks = [_peak(backbone.device, partial(denoise, rows)) for rows in (1, most)]
    start = time.perf_counter()
    denoise(1)
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)
    return time.perf_counter() - start, peaks[0] if most == 1 else peaks[1] - peaks[0]


def _step(backbone: Any, tap: int, seconds: float | None, memory: int, trouble: str, guided: bool) -> list[Line]:
    if seconds is None:
        return [("measured", f"no: {trouble}")]
    lines = [("a denoiser row", f"{_time(seconds)}, of which a judge after block {tap} that stands alone needs "
              f"{tap / backbone.num_blocks:.0%}")]  # fmt: skip
    if memory > 0:
        rows = 2 if guided and backbone.family.cfg != "two_calls" else 1
        fit = max(1, int(0.9 * _free(backbone.device) / memory / rows))
        many = f"about {fit}" if fit <= MANY else f"more than {MANY}"
        lines.append(("candidates that fit", f"{many} per batch; a row of the denoiser takes {_size(memory)}"))
    else:
        lines.append(("candidates that fit", "not measured: this device does not tell its memory"))
    return lines


def _costs(backbone: Any, tap: int, call: dict[str, Any], n: int, cuts: Any, seconds: float | None) -> list[Line]:
    from prism.backbone.steps import passes
    from prism.sampling.drafts import Draft, default_draft_steps
    from prism.sampling.plan import Workload, is_blind
    from prism.sampling.strategies import Early, First, Full

    guided, draft = backbone.guided(call), default_draft_steps(backbone.num_inference_steps(call))
    steps_of_run, steps_of_draft = None, None
    if seconds is not None:  # the pipeline can be called, so that its scheduler gives the real steps
        whole = {**call, **backbone.batch([PROMPT if backbone.family.takes_prompts else ""], [0], call)}
        steps_of_run, steps_of_draft = backbone.steps(whole), backbone.steps({**whole, "num_inference_steps": draft})
    load = Workload.of(backbone, call, n, tap, steps_of_run, steps_of_draft)
    if steps_of_draft is None:
        load = replace(load, draft_calls=(passes(backbone, call),) * draft)
    steps, early = len(load.calls), Early(cuts).settled(load, steps_of_run)
    schedule = early.cuts(load)
    rows = [(name, plan.rows(load)) for name, plan in (
        ("one video, no choice", First()),
        (f"early, {','.join(f'{step}:{keep}' for step, keep in schedule)}", early),
        (f"drafts of {len(load.draft_calls)} steps", Draft()),
        ("full", Full()),
    )]  # fmt: skip
    most = rows[-1][1]
    lines = [("a run", f"{steps} steps, {'with' if guided else 'without'} an unconditional pass")]
    for name, count in rows:
        duration = "" if seconds is None else f", about {_time(count * seconds)} in the denoiser"
        lines.append((name, f"{count:.0f} denoiser rows, {count / most:.0%} of full{duration}"))
    if is_blind(schedule):
        cost = rows[2][1] / most
        advice = (
            f"little: of {steps} steps, as a distilled model takes, the first cut comes at step 1, which sees pure "
            f"noise. Take the strategy full, or drafts at {cost:.0%} of its cost"
        )
        lines.append(("to cut", advice))
    else:
        lines.append(("to cut", f"yes: {steps - schedule[0][0]} of {steps} steps come after the first cut"))
    return lines


def _peak(device: torch.device, work: Callable[[], None]) -> int:
    """The most bytes that `work` allocates at once; 0 where the device does not say."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        work()
        return 0
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints its start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    allocated = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            most = max(most, allocated)
    return most


def _free(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.3g} s"


def _size(count: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2 ** (power - 2):
            return f"{count / 2**power:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"
