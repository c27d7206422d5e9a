"""Exactness, offload, memory, processes, compilation and speed on a GPU, in one run of a few minutes.

    python benchmarks/gpu_checks.py --out results                 # every check, on the GPU
    python benchmarks/gpu_checks.py --device cpu --out results    # tiny sizes; what needs a GPU is skipped with a line

Nothing is downloaded. Each check runs in a process of its own with a limit of its own; those that measure no time run
beside each other, then those that do, alone. A line per finding is printed, and appended at once to
`results/gpu_checks.jsonl` as {"check", "what", "outcome", "seconds", ...}. Outcomes: "ok", "failed", "number" (nothing
to pass), "skipped", and "broke" (an error, a crash or the limit). Ends with code 1 where something failed or broke.
"""

# ruff: noqa: E402 (where to import from comes first)

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "benchmarks")]
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that asking for a GPU leaves forks free to use it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import diffusers
import torch
from tests import stores, tiny, zoo
from tests.machinery import CALL, RUNS, seeded
from torch import distributed, nn

import prism
import real_shapes
import sampler_overhead
from prism.evaluation import evaluate
from prism.training import TrainConfig, train

MIB = 2**20
GIVE_UP = 20  # seconds a stopped process has to end


@dataclass(frozen=True)
class Setting:
    """The device, where findings go, whether sizes are tiny, and a folder with torchao or None."""

    device: torch.device
    out: Path
    small: bool
    torchao: str | None

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


class Findings:
    """Prints the findings of one check and appends each to the file at once."""

    def __init__(self, path: Path, check: str) -> None:
        self.path, self.check, self.start = path, check, time.perf_counter()

    def add(self, what: str, outcome: bool | str, **values: Any) -> None:
        name = {True: "ok", False: "failed"}.get(outcome, outcome) if isinstance(outcome, bool) else outcome
        seconds = round(time.perf_counter() - self.start, 1)
        row = {"check": self.check, "what": what, "outcome": name, "seconds": seconds, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row, default=str) + "\n")
        shown = ", ".join(f"{key} {_short(value)}" for key, value in values.items())
        print(f"{name:8s} {self.check}: {what}{' | ' if shown else ''}{shown} [{seconds} s]", flush=True)

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """An error inside is a finding, and the check goes on."""
        try:
            yield
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            self.add(what, "broke", error=f"{type(error).__name__}: {error}"[:600], at=place)
        finally:
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:400]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.detach().double() - other.detach().double()).abs().max())


def plain_call(pipe: Any, seed: int, call: dict[str, Any], prompt: str = tiny.PROMPT) -> torch.Tensor:
    return pipe(prompt, generator=seeded(seed), **call).frames


def search(pipe: Any, judge: prism.Judge, call: dict[str, Any], **options: Any) -> prism.BestOfNResult:
    options = {"n": 3, "seed": 5, "batch_size": 1, **options}
    return prism.best_of_n(pipe, judge, options.pop("prompt", tiny.PROMPT), **options, **call)


def compare(to: Findings, what: str, pipe: Any, judge: prism.Judge, call: dict[str, Any], runs: Any = RUNS) -> None:
    """The winner of each strategy beside its plain call, which is itself called twice."""
    for name in runs:
        with to.part(f"{what}, {name}"):
            result = search(pipe, judge, call, **RUNS[name])
            expected, again = (plain_call(pipe, result.seed, call) for _ in range(2))
            equal = torch.equal(result.latents.to(expected.device), expected)
            values = {"difference": difference(result.latents.to(expected.device), expected)}
            if not torch.equal(expected, again):
                values["two plain calls differ by"] = difference(expected, again)
            to.add(f"{what}, {name}", equal, **values)


# -- what is right


def exactness(to: Findings, setting: Setting) -> None:
    """The winner is the plain call's own; in a batch it is so to rounding."""

    def hunyuan() -> tuple[Any, dict[str, Any]]:
        pipe, call = zoo.wan_to_kandinsky.hunyuan()
        return pipe, {**call, "num_inference_steps": 5, "output_type": "latent"}

    families: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
        "wan": lambda: (tiny.wan("unipc"), CALL),
        "cogvideox": lambda: (tiny.cogvideox("dpm"), CALL),
        "hunyuan": hunyuan,
    }
    for dtype in (torch.float32, torch.bfloat16):
        for name, build in families.items():
            what = f"{name} {str(dtype)[6:]}"
            with to.part(what):
                pipe, call = build()
                pipe.to(setting.device, dtype)
                judge = prism.Judge.untrained(pipe, tap=2, dim=16)
                compare(to, what, pipe, judge, call)
                result = search(pipe, judge, call, batch_size=3, **RUNS["early"])
                expected = plain_call(pipe, result.seed, call)
                off, scale = difference(result.latents, expected), float(expected.abs().max())
                to.add(
                    f"{what}, batch of 3", off <= (1e-3 if dtype == torch.float32 else 0.1) * scale, off=off, of=scale
                )
    with to.part("ShapeWorld"):
        pipe, judge, call = shapeworld(setting)
        for name in RUNS:
            result = search(pipe, judge, call, prompt=SENTENCE, **RUNS[name])
            expected = plain_call(pipe, result.seed, call, SENTENCE)
            off = difference(result.latents, expected)
            to.add(f"ShapeWorld, {name}", torch.equal(result.latents, expected), difference=off)
        result = search(pipe, judge, call, prompt=SENTENCE, batch_size=3, **RUNS["early"])
        off = difference(result.latents, plain_call(pipe, result.seed, call, SENTENCE))
        to.add("ShapeWorld, batch of 3", off < 1e-2, off=off)


SENTENCE = "a red circle moves right"


def shapeworld(setting: Setting) -> tuple[Any, prism.Judge, dict[str, Any]]:
    pipe = prism.shapeworld.pipeline().to(setting.device)
    steps = {"num_inference_steps": 5} if setting.small else {}
    return pipe, prism.Judge.untrained(pipe, dim=64), {**prism.shapeworld.CALL, **steps, "output_type": "latent"}


def gradients(to: Findings, setting: Setting) -> None:
    """The head's folded attention beside Eq. 2 as printed, with gradients, in float32 and bfloat16 tokens."""
    for dtype in (torch.float32, torch.bfloat16):
        with to.part(f"head {dtype}"):
            torch.manual_seed(0)
            head = prism.QueryHead(64, 128).to(setting.device)
            tokens = torch.randn(2, 600 if setting.small else 20_000, 64).to(setting.device, dtype)
            ours, theirs = head(tokens), real_shapes.plain(head, tokens)
            weights = [value for value in head.parameters() if value.requires_grad]
            found = torch.autograd.grad(ours.sum(), weights, allow_unused=True)
            wanted = torch.autograd.grad(theirs.sum(), weights, allow_unused=True)
            pairs = [(a, b) for a, b in zip(found, wanted) if a is not None and b is not None]
            off, slope = difference(ours, theirs), max(difference(a, b) for a, b in pairs)
            scale = max(float(b.abs().max()) for _, b in pairs)
            to.add(
                f"head on {str(dtype)[6:]}", off < 1e-3 and slope < 1e-2 * scale, score=off, gradient=slope, of=scale
            )


# -- where weights wait


def bigger_wan() -> Any:
    """A Wan whose weights are heavier than what they compute, about 200 MB in float32."""
    torch.manual_seed(0)
    pipe = tiny.wan("unipc")
    pipe.register_modules(
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=8,
            attention_head_dim=64,
            in_channels=16,
            out_channels=16,
            text_dim=tiny.TEXT_WIDTH,
            freq_dim=64,
            ffn_dim=2048,
            num_layers=12,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ).eval()
    )
    return pipe


def offload(to: Findings, setting: Setting) -> None:
    """Offloaded by diffusers' own methods: the same winner, less memory, and freed afterwards."""
    build = tiny.wan if setting.small else bigger_wan
    device = setting.device
    group: dict[str, Any] = {"onload_device": device, "offload_device": torch.device("cpu")}
    ways: dict[str, Callable[[Any], Any]] = {
        "nothing": lambda pipe: pipe.to(device),
        "model": lambda pipe: pipe.enable_model_cpu_offload(device=device),
        "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device=device),
        "blocks": lambda pipe: pipe.enable_group_offload(**group, offload_type="block_level", num_blocks_per_group=1),
        "leaves": lambda pipe: pipe.enable_group_offload(**group, offload_type="leaf_level"),
        "leaves, stream": lambda pipe: pipe.enable_group_offload(**group, offload_type="leaf_level", use_stream=True),
        "blocks, stream": lambda pipe: pipe.enable_group_offload(
            **group, offload_type="block_level", num_blocks_per_group=1, use_stream=True
        ),
    }
    if not setting.gpu:
        ways = {name: ways[name] for name in ("nothing", "model", "blocks", "leaves")}
    wanted: dict[str, Any] = {}
    for way, treat in ways.items():
        with to.part(way):
            pipe = build()
            treat(pipe)
            judge = prism.Judge.untrained(pipe, tap=2, dim=16)
            if setting.gpu:
                torch.cuda.synchronize()
                gc.collect()
                torch.cuda.empty_cache()
            before = memory(setting)
            compare(to, way, pipe, judge, CALL)
            peaks = {
                "plain": peak_allocated(setting, partial(plain_call, pipe, 5, CALL)),
                "search": peak_allocated(setting, partial(search, pipe, judge, CALL)),
            }
            scores = judge.score(torch.zeros(1, 16, 3, 4, 4), tiny.PROMPT, 700, **CALL).cpu()
            left = memory(setting) - before
            wanted.setdefault("scores", scores)
            wanted.setdefault("peak", peaks["search"])
            off = difference(scores, wanted["scores"])
            to.add(f"{way}, judge.score", off < 1e-5, difference=off)
            lower = way == "nothing" or not setting.gpu or peaks["search"] < wanted["peak"]
            to.add(f"{way}, peak", lower, MiB=peaks["search"], plain=peaks["plain"], without=wanted["peak"])
            to.add(f"{way}, memory kept after", left < 16, MiB=left)
            if way == "model":
                hooked = all("_hf_hook" in vars(part) for part in (pipe.text_encoder, pipe.transformer, pipe.vae))
                home = next(pipe.transformer.parameters()).device.type
                to.add("model, hooks back and weights home", hooked and home == "cpu", weights=home)
            if way == "sequential":
                to.add("sequential, weights on meta", next(pipe.transformer.parameters()).is_meta)
            pipe = judge = None


def peak_allocated(setting: Setting, run: Callable[[], Any]) -> float:
    """MiB at the peak of a call; 0 on a CPU."""
    if setting.gpu:
        torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / MIB if setting.gpu else 0.0


def memory(setting: Setting) -> float:
    gc.collect()
    if not setting.gpu:
        return 0.0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() / MIB


# -- where memory ends


@contextlib.contextmanager
def at_most(setting: Setting, spare: float) -> Iterator[None]:
    """At most `spare` MiB above what is allocated now; on a CPU no limit."""
    if not setting.gpu:
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory / MIB
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() / MIB + spare) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak_of(setting: Setting, run: Callable[[], Any]) -> tuple[Any, float]:
    """What a run gives, and the MiB that it reserved above what there was."""
    gc.collect()
    if not setting.gpu:
        return run(), 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    return result, (torch.cuda.max_memory_reserved() - before) / MIB


def shortage(to: Findings, setting: Setting) -> None:
    """Where memory runs out, batches are halved, the result is that of enough memory, and all is given back."""
    side, frames = (32, 9) if setting.small else (256, 33)
    rows = 4 if setting.small else 16
    call = {**CALL, "height": side, "width": side, "num_frames": frames, "num_inference_steps": 4}
    pipe = tiny.wan("unipc").to(setting.device)
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)

    def run(size: int) -> Any:
        return search(pipe, judge, call, n=rows, schedule=[(3, 1)], batch_size=size)

    def halved(what: str, work: Callable[[int], Any], same: Callable[[Any, Any], tuple[bool, Any]]) -> None:
        with to.part(what):
            work(1)  # what is set up once
            _, one = peak_of(setting, lambda: work(1))
            wide, many = peak_of(setting, lambda: work(rows))
            spare, before = one + 0.4 * (many - one), memory(setting)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with at_most(setting, spare):
                    tight = work(rows)
            said = [str(each.message) for each in caught if "Memory ran out" in str(each.message)]
            equal, off = same(tight, wide)
            del tight, wide
            values = {"MiB": spare, "one": one, "many": many, "off": off, "said": said[:4]}
            to.add(f"{what}: halved, same result", equal and (bool(said) or not setting.gpu), **values)
            left = memory(setting) - before
            to.add(f"{what}: memory freed", left < 2, MiB=left)

    halved(
        "search",
        run,
        lambda a, b: (a.seed == b.seed and difference(a.latents, b.latents) < 1e-3, difference(a.latents, b.latents)),
    )
    if setting.gpu:
        with to.part("search that fits nowhere"):
            try:
                with at_most(setting, 2.0):
                    run(rows)
                to.add("search that fits nowhere: a sentence", False)
            except prism.PrismError as error:
                to.add("search that fits nowhere: a sentence", "Memory ran out" in str(error), said=str(error))
            result = run(1)
            to.add("search after it", torch.equal(result.latents, plain_call(pipe, result.seed, call)))
    with tempfile.TemporaryDirectory() as place:
        shape = (16, (frames - 1) // 4 + 1, side // 8, side // 8)
        store = stores.make(Path(place) / "store", (1, 1, 1), rows, {"call": call}, shape)
        runs = iter(range(1000))

        def learn(size: int) -> dict[str, torch.Tensor]:
            fresh = prism.Judge.untrained(pipe, tap=2, dim=16, dimensions=("VQ", "MQ"))
            config = TrainConfig(steps=2, prompts_per_step=1, max_rows=size, learning_rate=1e-3)
            train(store, fresh, config, Path(place) / f"run-{next(runs)}", progress=False)
            return {name: value.detach().cpu() for name, value in fresh.head.named_parameters()}

        def alike(a: Any, b: Any) -> tuple[bool, float]:
            off = max(difference(a[name], b[name]) for name in a)
            return off < 5e-3, off

        halved("training", learn, alike)
        head = prism.Judge.untrained(pipe, tap=2, dim=16, dimensions=("VQ", "MQ"))

        def figures(size: int) -> list[float]:
            rows = evaluate(head, store, timesteps=[700, 300], batch_size=size, progress=False)
            return [row["without_ties"] for row in rows]

        halved("evaluation", figures, lambda a, b: (max(off := [abs(x - y) for x, y in zip(a, b)]) < 0.02, off))


# -- several processes


def processes(to: Findings, setting: Setting) -> None:
    """`distribute=` and training, alone under NCCL and by two processes on one device under gloo."""
    backends = [("nccl", 1), ("gloo", 2)] if setting.gpu else [("gloo", 1), ("gloo", 2)]
    with tempfile.TemporaryDirectory() as place:
        for backend, count in backends:
            what = f"{backend}, {count} process{'es' * (count > 1)}"
            with to.part(what):
                inside = [str(Path(__file__).resolve()), "--inside", backend, "--device", str(setting.device)]
                launched(to, f"{what}: distribute", count, [*inside, "--out", str(to.path)], 45)
        with to.part("prism train"):
            folder = Path(place)
            tiny.wan().save_pretrained(folder / "pipe")
            stores.make(folder / "store")
            for count in (1, 2):
                out = folder / f"trained-{count}"
                command = f"-m prism train --backbone {folder}/pipe --data {folder}/store --device {setting.device} "
                command += f"--dim 16 --tap 2 --steps 3 --prompts-per-step 2 --out {out}"
                # two processes on one GPU are no setting of NCCL's: a sentence is as good as a result
                either = setting.gpu and count > 1
                launched(to, f"prism train, {count} process{'es' * (count > 1)}", count, command.split(), 45, either)
            heads = sorted(folder.glob("trained-*/head/model.safetensors"))
            to.add("heads that were trained", "number", heads=[path.parts[-3] for path in heads])


def launched(to: Findings, what: str, count: int, arguments: list[str], limit: float, either: bool = False) -> None:
    """A command under torchrun; `either`: its outcome is reported and nothing fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as run:
        try:
            text = run.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            text = run.communicate()[0] + f"\nstopped after {limit:.0f} s"
    lines = [line for line in text.splitlines() if "rror" in line or "stopped after" in line]
    to.add(
        what,
        "number" if either else run.returncode == 0,
        code=run.returncode,
        **({"said": lines[:6]} if run.returncode else {}),
    )


def inside(backend: str, device: str, path: Path) -> None:
    """What each process of a group does: what one finds alone, all find together."""
    distributed.init_process_group(backend)
    to = Findings(path, "processes")
    pipe = tiny.wan("unipc").to(device)
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    size = distributed.get_world_size()
    first = distributed.get_rank() == 0
    cases = {name: (options, tiny.PROMPT) for name, options in RUNS.items()}
    prompts = [tiny.PROMPT, tiny.OTHER_PROMPT, "a cat runs"]
    for name, (options, prompt) in cases.items():
        alone = search(pipe, judge, CALL, prompt=prompt, **options)
        shared = search(pipe, judge, CALL, prompt=prompt, distribute="candidates", **options)
        equal = torch.equal(alone.latents.cpu(), shared.latents.cpu()) and alone.scores == shared.scores
        if first:
            to.add(f"{backend}, {size}: candidates of {name}", equal)
    alone = search(pipe, judge, CALL, prompt=prompts)
    shared = search(pipe, judge, CALL, prompt=prompts, distribute="prompts")
    equal = all(torch.equal(a.latents.cpu(), b.latents.cpu()) for a, b in zip(alone, shared))
    if first:
        to.add(f"{backend}, {size}: prompts", equal)
    distributed.destroy_process_group()


# -- what is compiled


def compiled(to: Findings, setting: Setting) -> None:
    """Compiled blocks are listened to, a denoiser compiled as a whole is probed; CUDA graphs as well."""
    options: dict[str, dict[str, Any]] = {"inductor": {"backend": "inductor"}} if not setting.small else {}
    if setting.small:
        options["eager"] = {"backend": "eager"}
    if setting.gpu:
        options["CUDA graphs"] = {"mode": "reduce-overhead"}
    ways: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
        "blocks": lambda pipe, how: pipe.transformer.compile_repeated_blocks(**how),
        "whole": lambda pipe, how: pipe.transformer.compile(**how),
        "wrapped": lambda pipe, how: setattr(pipe, "transformer", torch.compile(pipe.transformer, **how)),
    }
    for name, how in options.items():
        for way, treat in ways.items():
            what = f"{name}, {way}"
            with to.part(what):
                torch._dynamo.reset()
                pipe = tiny.wan("unipc", num_layers=2 if setting.small else 3).to(setting.device)
                judge = prism.Judge.untrained(pipe, tap=1, dim=16)
                treat(pipe, how)
                try:
                    first = plain_call(pipe, 5, CALL)
                    to.add(
                        f"{what}, the stock pipeline itself",
                        "number",
                        repeats=torch.equal(first, plain_call(pipe, 5, CALL)),
                    )
                except Exception as error:
                    to.add(
                        f"{what}, the stock pipeline itself", "number", error=f"{type(error).__name__}: {error}"[:300]
                    )
                    continue
                compare(to, what, pipe, judge, CALL)
                to.add(f"{what}, listens", judge.backbone.listens is (way == "blocks"), listens=judge.backbone.listens)


def quantised(to: Findings, setting: Setting) -> None:
    """A denoiser that torchao quantised, and a head on it."""
    if setting.torchao:
        sys.path.insert(0, setting.torchao)
    try:
        from torchao import quantization
    except ImportError as error:
        to.add("torchao", "skipped", why=str(error)[:200])
        return
    kinds = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
    if setting.gpu:
        kinds |= {"int8 dynamic": "Int8DynamicActivationInt8WeightConfig"}
        kinds |= {"fp8 dynamic": "Float8DynamicActivationFloat8WeightConfig"}
    for name, config in kinds.items():
        with to.part(name):
            pipe = bigger_wan().to(setting.device, torch.bfloat16)

            def wide(module: nn.Module, _name: str) -> bool:
                return isinstance(module, nn.Linear) and min(module.weight.shape) >= 512

            quantization.quantize_(pipe.transformer, getattr(quantization, config)(), filter_fn=wide)
            judge = prism.Judge.untrained(pipe, tap=2, dim=16)
            compare(to, name, pipe, judge, CALL, ["early"] if setting.small else RUNS)
            with tempfile.TemporaryDirectory() as place:
                judge.save_pretrained(Path(place) / "head")
                loaded = prism.Judge.from_pretrained(Path(place) / "head", pipe)
                latents = torch.randn(1, 16, 3, 4, 4, generator=seeded(0))
                one, two = (each.score(latents, tiny.PROMPT, 700, **CALL) for each in (judge, loaded))
                to.add(f"{name}, head saved and loaded", torch.equal(one, two), finite=bool(one.isfinite().all()))


# -- what it takes


def numbers(to: Findings, bench: real_shapes.Bench) -> None:
    """The rows and goals of a benchmark since the last time, as findings."""
    for row in bench.rows:
        values = {"median": row.seconds, "low": row.low, "high": row.high, "repeats": row.repeats, "GiB": row.memory}
        to.add(f"{row.model}, {row.what}", "number", **values, note=row.note)
    for goal in bench.goals:
        bound = None if goal.limit is None else f"{'at least' if goal.at_least else 'at most'} {goal.limit:g}"
        missed = bench.device.type == "cuda" and goal.met is False
        outcome = "number" if goal.met is None or bench.device.type != "cuda" else not missed
        to.add(f"{goal.model}, {goal.what}", outcome, value=goal.value, goal=bound)
    bench.rows.clear()
    bench.goals.clear()


def speed_of_the_head(to: Findings, setting: Setting) -> None:
    """The head alone at the tokens of Wan2.1-1.3B, 81 frames at 480p."""
    bench = real_shapes.Bench(setting.device, 2 if setting.small else 20)
    dtype = torch.bfloat16 if setting.gpu else torch.float32
    with quiet():
        real_shapes.measure_head(bench, 200 if setting.small else real_shapes.HEAD_TOKENS, dtype)
    numbers(to, bench)


def speed_at_real_shapes(to: Findings, setting: Setting) -> None:
    """Wan2.1-1.3B with random weights: a short clip first, then all 81 frames at 480p."""
    name, dtype = "wan2.1-1.3b", torch.bfloat16 if setting.gpu else torch.float32
    to.add(real_shapes.machine(setting.device), "number")
    if setting.small:
        from tests.test_real_shapes import TINY

        real_shapes.MODELS[name] = TINY
    for tokens, repeats in [(24, 2)] if setting.small else [(8000, 5), (None, 3)]:
        with to.part(f"{tokens or 'all'} tokens"):
            bench = real_shapes.Bench(setting.device, repeats)
            with quiet():
                real_shapes.measure_model(bench, name, tokens, dtype)
            numbers(to, bench)


def overhead(to: Findings, setting: Setting) -> None:
    """What the sampler itself costs on ShapeWorld, `sampler_overhead.py` on this device."""
    pipe, judge, call = shapeworld(setting)
    settings = dict(sampler_overhead.SETTINGS)
    if setting.small:
        settings = {"early 3:1": ({"schedule": [(3, 1)]}, False)}
    call.pop("output_type")
    search(pipe, judge, call, n=8, batch_size=8, prompt=SENTENCE, strategy="full")
    for name, (options, barred) in settings.items():
        ledgers = [
            prism.best_of_n(pipe, judge, SENTENCE, n=8, seed=seed, **options, **call).ledger
            for seed in range(1 if setting.small else 3)
        ]
        ledger = sorted(ledgers, key=lambda each: each.overhead_seconds / each.seconds)[len(ledgers) // 2]
        share = ledger.overhead_seconds / ledger.seconds
        bar = sampler_overhead.LIMIT if barred else None
        to.add(f"sampler overhead, {name}", "number", share=share, bar=bar, run=ledger.seconds, parts=ledger.parts)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# -- running them


@dataclass(frozen=True)
class Check:
    """What is checked, its limit in seconds, and whether it measures time and so runs alone."""

    run: Callable[[Findings, Setting], None]
    limit: float
    alone: bool = False


CHECKS = {
    "exactness": Check(exactness, 120),
    "offload": Check(offload, 140),
    "shortage": Check(shortage, 140),
    "gradients": Check(gradients, 60),
    "processes": Check(processes, 200),
    "compiled": Check(compiled, 200),
    "quantised": Check(quantised, 140),
    "head": Check(speed_of_the_head, 60, True),
    "real shapes": Check(speed_at_real_shapes, 170, True),
    "overhead": Check(overhead, 80, True),
}


def work(name: str, setting: Setting) -> None:
    """A check in a process of its own."""
    to = Findings(setting.out, name)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if setting.gpu:
            torch.zeros(1, device=setting.device)
            torch.cuda.set_device(0)
        torch.set_num_threads(2)
        CHECKS[name].run(to, setting)
        to.add("done", "number")
    except BaseException as error:
        to.add(
            "the check", "broke", error=f"{type(error).__name__}: {error}"[:600], trace=traceback.format_exc()[-1500:]
        )
        raise SystemExit(1) from None


def _probe(device: str) -> None:
    torch.zeros(1, device=device)


def run_beside(context: Any, names: Sequence[str], setting: Setting, until: float) -> None:
    """Checks beside each other, each ended at its limit or at the run's."""
    start = time.perf_counter()
    open_runs = {name: context.Process(target=work, args=(name, setting)) for name in names}
    for run in open_runs.values():
        run.start()
    while open_runs:
        for name, run in list(open_runs.items()):
            run.join(0.1)
            limit = min(start + CHECKS[name].limit, until) if setting.gpu else until
            if run.is_alive() and time.perf_counter() > limit:
                run.kill()
                run.join(GIVE_UP)
                Findings(setting.out, name).add("the check", "broke", error="stopped at its limit of seconds")
            elif run.is_alive():
                continue
            elif run.exitcode and run.exitcode != 1:  # 1: it said why
                Findings(setting.out, name).add("the check", "broke", error=f"ended with code {run.exitcode}")
            del open_runs[name]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for tiny sizes (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_checks.jsonl")
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"some of {', '.join(CHECKS)}")
    parser.add_argument("--seconds", type=float, default=420.0, help="stop what still runs then (default %(default)s)")
    parser.add_argument("--torchao", help="folder in which torchao was installed, for the check of quantised weights")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        inside(options.inside, options.device, options.out)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    device, until = torch.device(options.device), time.perf_counter() + options.seconds
    setting = Setting(device, options.out / "gpu_checks.jsonl", device.type != "cuda", options.torchao)
    context: Any = multiprocessing.get_context("fork")  # everything is imported already
    if setting.gpu:
        probe = context.Process(target=_probe, args=(options.device,))
        probe.start()
        probe.join(90)
        if probe.exitcode:
            context = multiprocessing.get_context("spawn")
            print(f"a forked process cannot use the GPU (code {probe.exitcode}); each starts anew", flush=True)
    names = options.only or list(CHECKS)
    first = [name for name in names if not CHECKS[name].alone]
    together = len(first) if setting.gpu else 2
    for place in range(0, len(first), max(1, together)):
        run_beside(context, first[place : place + together], setting, until)
    for name in names:
        if CHECKS[name].alone:
            run_beside(context, [name], setting, until)
    return summary(setting.out)


def summary(path: Path) -> int:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    bad = [row for row in rows if row["outcome"] in ("failed", "broke")]
    print(f"\n{sum(row['outcome'] == 'ok' for row in rows)} ok, {len(bad)} not:")
    for row in bad:
        print("  " + ", ".join(f"{key} {_short(value)}" for key, value in row.items() if key != "trace"))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
