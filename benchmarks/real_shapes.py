"""Speed and memory at real shapes: published configurations with random weights, measured in one run.

    python benchmarks/real_shapes.py                                  # on the GPU where there is one, every model
    python benchmarks/real_shapes.py --model wan2.1-1.3b --device cpu --tokens 1000 --out rows.md

Nothing is downloaded (`published.py`). What is compared is measured in turns, and every goal is a ratio within the run.
The goals are those of a GPU at full size; without one, the denoiser and the VAE run at a reduced size, which is named.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.nn import functional as F

import prism
from prism.backbone import Backbone
from published import MODELS, build, reduced

PROMPT = "a cat runs"
CANDIDATES = 8
NOISE_LEVEL = 900.0
HEAD_TOKENS = 32_760  # of Wan2.1-1.3B at 832x480, 81 frames
CPU_TOKENS = 500
SECONDS_A_ROW = {"cuda": 20.0, "cpu": 20.0}  # after which nothing is repeated
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """Something that was measured: median seconds, the fastest and slowest repeat, and peak memory in GiB."""

    model: str
    what: str
    seconds: float
    low: float
    high: float
    repeats: int
    memory: float
    note: str = ""


@dataclass(frozen=True)
class Goal:
    """A ratio of this run beside what it should be on a GPU; `limit` None: for information."""

    model: str
    what: str
    value: float
    limit: float | None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


# -- measuring


def quick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; on a CPU bfloat16 or float32, whichever multiplies matrices quicker."""
    if device.type == "cuda":
        return torch.bfloat16
    spent = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1024, 1536).to(dtype), torch.randn(1536, 1536).to(dtype)
        spent[dtype] = min(timed(lambda a=a, b=b: a @ b, device)[0] for _ in range(5))
    return min(spent, key=lambda dtype: spent[dtype])


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds and peak GiB of one call: the GPU's allocated memory, or the process's on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        _reset_resident_peak()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else _resident_peak()


def _reset_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole run so far
        return


def _resident_peak() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Bench:
    """Takes measurements, and keeps the rows and goals of a run."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.rows: list[Row] = []
        self.goals: list[Goal] = []

    def measure(self, model: str, note: str, **functions: Callable[[], Any]) -> dict[str, float]:
        """Median seconds of each function. They take turns, so that a change of the machine's speed hits them alike.

        Each is called once to warm up, unless that took so long that it has to be the measurement. A function that
        runs out of memory gives a row that says so, and is missing from the answer.
        """
        gc.collect()
        budget, found = SECONDS_A_ROW[self.device.type], dict[str, list[tuple[float, float]]]()
        for name, function in functions.items():
            try:
                first = timed(function, self.device)
                found[name] = [first] if first[0] > 2 * budget else []
            except torch.cuda.OutOfMemoryError:
                gc.collect()
                torch.cuda.empty_cache()
                self.rows.append(Row(model, name.replace("_", " "), *[float("nan")] * 3, 0, float("nan"), "no memory"))
                print(f"  {name.replace('_', ' '):28s} does not fit")
        open_names = [name for name in found if not found[name]]
        for _ in range(self.repeats):
            for name in open_names:
                if sum(seconds for seconds, _ in found[name]) < budget:
                    found[name].append(timed(functions[name], self.device))
        for name, runs in found.items():
            seconds = [run[0] for run in runs]
            row = Row(
                model,
                name.replace("_", " "),
                statistics.median(seconds),
                min(seconds),
                max(seconds),
                len(runs),
                max(run[1] for run in runs),
                note,
            )
            self.rows.append(row)
            print(f"  {row.what:28s} {row.seconds:10.4f} s ({row.low:.4f} to {row.high:.4f}), {row.memory:6.2f} GiB")
        return {name: statistics.median(run[0] for run in runs) for name, runs in found.items()}

    def spread(self, model: str, what: str) -> float:
        """How far the repeats of a row lie apart, as a share of their median; 0 where it did not run."""
        rows = [row for row in self.rows if (row.model, row.what) == (model, what) and row.repeats]
        return (rows[-1].high - rows[-1].low) / rows[-1].seconds if rows else 0.0

    def goal(self, model: str, what: str, value: float, limit: float | None = None, at_least: bool = False) -> None:
        self.goals.append(Goal(model, what, value, limit, at_least))


def measure_model(bench: Bench, name: str, tokens: int | None, dtype: torch.dtype) -> None:
    model = MODELS[name]
    pipe = build(model, dtype, bench.device)
    judge = prism.Judge.untrained(pipe, dim=None if model.text_width < 1000 else 1536)
    backbone: Backbone = judge.backbone
    height, width, frames = reduced(model.video, tokens)
    conditioning = backbone.condition([PROMPT], height=height, width=width, num_frames=frames)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((1, *conditioning.shape), generator=generator).to(bench.device)
    levels = torch.tensor([NOISE_LEVEL], device=bench.device)
    arguments = conditioning.call(latents, backbone.family.level(pipe.scheduler, levels)[2])
    read = backbone.tokens(latents, conditioning, NOISE_LEVEL, judge.taps)
    count, depth = read.visual.shape[1], judge.tap / backbone.num_blocks
    note = f"{width}x{height}, {frames} frames, {count} tokens"
    blocks = f"{backbone.num_blocks} of {model.published_blocks} blocks, tap {judge.tap}"
    print(f"{name}: {note}, {blocks}, {backbone.num_parameters / 1e9:.2f} B weights, {str(dtype)[6:]}")

    def listen() -> None:
        heard, _ = backbone.read(arguments, judge.taps, stop=False)
        judge.score_tokens(heard)

    def stand_alone() -> None:
        judge.score_tokens(backbone.read(arguments, judge.taps, stop=True)[0])

    with torch.no_grad():
        found = bench.measure(
            name,
            f"{note}, {blocks}",
            step=lambda: backbone.denoiser(**arguments),
            step_with_the_judge_listening=listen,
            stand_alone_score=stand_alone,
            head_on_these_tokens=lambda: judge.score_tokens(read),
        )
        step, head = found.get("step"), found.get("head_on_these_tokens")
        noise = bench.spread(name, "step")
        verdict = noise <= 0.05  # a step that varies by more tells nothing of one per cent
        unclear = "" if verdict else f" (no verdict: a step varies by {noise:.0%})"
        if step and "step_with_the_judge_listening" in found:
            added = found["step_with_the_judge_listening"] / step - 1
            bench.goal(name, f"what listening adds to a step{unclear}", added, 0.01 if verdict else None)
        if step and head:
            bench.goal(name, "the head over a step", head / step, 0.01)
        if step and "stand_alone_score" in found:
            off = abs(found["stand_alone_score"] / step / depth - 1)
            what = f"stand-alone score, off {judge.tap}/{backbone.num_blocks} of a step by{unclear}"
            bench.goal(name, what, off, 0.05 if verdict else None)
        decoding = bench.measure(name, note, decode=lambda: backbone.decode(latents))
        if "decode" not in decoding:
            pipe.vae.enable_tiling()
            decoding = bench.measure(name, f"{note}, tiled", decode_in_tiles=lambda: backbone.decode(latents))
        decode = next(iter(decoding.values()), None)
        if decode and head:
            bench.goal(name, f"{CANDIDATES} decodes over {CANDIDATES} scores by listening", decode / head, 20, True)
        if decode and "stand_alone_score" in found:
            bench.goal(name, "the same, scores that stand alone", decode / found["stand_alone_score"])


# -- the head alone


def plain(head: prism.QueryHead, tokens: Tensor) -> Tensor:
    """Eq. 2 as printed: every token is normalised, projected, and made a key and a value."""
    projected = head.w_p(F.layer_norm(tokens.float(), (head.width,)))
    split = lambda value: value.unflatten(-1, (head.num_heads, -1)).transpose(1, 2)  # noqa: E731
    query = head.w_q(head.query).expand(len(tokens), -1, -1)
    found = F.scaled_dot_product_attention(split(query), split(head.w_k(projected)), split(head.w_v(projected)))
    return head.mlp(head.norm(head.w_o(found.transpose(1, 2).flatten(2)).mean(1)))


def measure_head(bench: Bench, length: int, dtype: torch.dtype, width: int = 1536) -> None:
    name, note = "head", f"{length} tokens of width {width}, {str(dtype)[6:]}, D = {width}"
    print(f"{name}: {note}")
    head = prism.QueryHead(width, width).to(bench.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn((1, length, width), generator=generator).to(bench.device, dtype)

    def gradient(score: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.backward(score(tokens).sum(), inputs=list(head.parameters()))

    def silent(score: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: score(tokens))

    by_formula = lambda value: plain(head, value)  # noqa: E731
    found = bench.measure(
        name,
        note,
        read_once=silent(torch.sum),
        folded=silent(head),
        folded_with_gradient=gradient(head),
    )
    slow = bench.measure(name, note, plain=silent(by_formula), plain_with_gradient=gradient(by_formula))
    bench.goal(name, "folded over reading the tokens once", found["folded"] / found["read_once"], 3)
    both = found["folded_with_gradient"] / found["read_once"]
    bench.goal(name, "folded with gradient over reading them twice", both / 2, 3)
    if "plain" in slow:
        bench.goal(name, "plain over folded", slow["plain"] / found["folded"], 10, True)
        difference = (silent(head)() - silent(by_formula)()).abs().max()
        bench.goal(name, "largest difference of a score, folded and plain", float(difference), 1e-4)
    if "plain_with_gradient" in slow:
        ratio = slow["plain_with_gradient"] / found["folded_with_gradient"]
        bench.goal(name, "plain over folded, with gradient", ratio, 10, True)


# -- reporting


def machine(device: torch.device) -> str:
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {versions}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{load}, {versions}"


def markdown(bench: Bench, title: str) -> str:
    lines = [title, "", "| model | measured | seconds | least to most | repeats | peak GiB | |", "|---|" + "---|" * 6]
    for row in bench.rows:
        spread, used = f"{row.low:.4g} to {row.high:.4g}", f"{row.memory:.2f}"
        lines.append(
            f"| {row.model} | {row.what} | {row.seconds:.4g} | {spread} | {row.repeats} | {used} | {row.note} |"
        )
    lines += ["", "| model | ratio | value | goal on a GPU | |", "|---|---|---|---|---|"]
    for goal in bench.goals:
        wanted = "" if goal.limit is None else f"{'at least' if goal.at_least else 'at most'} {goal.limit:g}"
        met = {None: "", True: "met", False: "**missed**"}[goal.met]
        lines.append(f"| {goal.model} | {goal.what} | {goal.value:.4g} | {wanted} | {met} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    choices = [*MODELS, "all", "none"]
    parser.add_argument("--model", choices=choices, help="none: the head alone; default: all, on a CPU the first")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: the GPU where there is one")
    parser.add_argument("--tokens", type=int, help=f"about how many a video; default: all, on a CPU {CPU_TOKENS}")
    parser.add_argument("--head-tokens", type=int, default=HEAD_TOKENS, help="of the head alone (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="after a warm-up; slow rows get fewer")
    parser.add_argument("--out", type=Path, help="write the rows there as Markdown")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave it out, or say cpu.")
    if min(options.repeats, options.head_tokens, options.tokens or 1) < 1:
        parser.error("--repeats, --tokens and --head-tokens must be 1 or more.")
    tokens = options.tokens or (None if device.type == "cuda" else CPU_TOKENS)
    bench, dtype, title = Bench(device, options.repeats), quick_dtype(device), machine(device)
    print(title)
    measure_head(bench, options.head_tokens, dtype)
    wanted = options.model or ("all" if device.type == "cuda" else next(iter(MODELS)))
    for name in {"all": list(MODELS), "none": []}.get(wanted, [wanted]):
        try:
            measure_model(bench, name, tokens, dtype)
        except torch.cuda.OutOfMemoryError:
            bench.rows.append(Row(name, "all", *[float("nan")] * 3, 0, float("nan"), "no memory"))
            print(f"{name} does not fit")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    text = markdown(bench, title)
    print(f"\n{text}")
    if options.out is not None:
        options.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
