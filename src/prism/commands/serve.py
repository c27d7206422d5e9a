"""`prism serve`: a reward service that trainers ask over HTTP."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prism.commands.options import Address, Models, Seed, Several, levels_of, option
from prism.errors import PrismError, number, quoted, whole

TOKEN = "PRISM_TOKEN"


@dataclass(frozen=True)
class Size:
    """The videos that are scored, where they are not as large as the backbone's call.json says."""

    num_frames: Annotated[int | None, option("N", "as the pipeline makes them")] = None
    """Frames of a video."""
    height: Annotated[int | None, option("PIXELS", "as the pipeline makes them")] = None
    """Height of a video."""
    width: Annotated[int | None, option("PIXELS", "as the pipeline makes them")] = None
    """Width of a video."""


@dataclass(frozen=True)
class Scores:
    """What a score is."""

    dimension: Annotated[str | None, option("NAME", "overall")] = None
    """The dimension that is the reward."""
    draws: Annotated[int | None, option("N", "1 for latents, 4 for clips")] = None
    """Noise draws averaged over."""
    levels: Annotated[str | None, option("T,T", "the reference's, else those the head is best at", name="t")] = None
    """Noise levels of clips, whose scores are averaged. Latents come with a level of their own."""
    seed: Seed = 0


@dataclass(frozen=True)
class Queue:
    """Batches and limits."""

    max_batch_size: int = 16
    """Most rows that are scored together; halved where memory runs out."""
    max_wait_ms: float = 10.0
    """Milliseconds that a row waits for others to be scored with."""
    max_queue: int = 1024
    """Most rows that wait; more are refused (503)."""
    max_queue_seconds: float = 120.0
    """Seconds after which a row that still waits is given up (503)."""
    max_body_mb: int = 256
    """Most megabytes of a request (413); four times as many of all together (503)."""
    max_elements: int = 2**26
    """Most numbers in the tensors of a request."""
    body_seconds: float = 10.0
    """Seconds that sending a request may take (408), beside the time of 256 KiB per second."""


@dataclass(frozen=True)
class Judged(Models):
    """Models and their precision."""

    head: Annotated[str | None, option("NAME", "the embedded head")] = None
    """Trained head: a folder, or an id on the Hub."""
    judges: Annotated[Path | None, option("FILE", "the one of --head and --backbone")] = None
    """YAML file of several judges, by name: head, backbone, device, dtype, call, dimension, draws, levels, seed."""


@dataclass(frozen=True)
class Spread(Several):
    """Several machines or GPUs, by Ray Serve."""

    ray: Annotated[str | None, Address, option(default="without Ray")] = None
    """Give each judge processes of its own, of the Ray cluster at ADDRESS, or auto for this machine's.
    Without ADDRESS, or with local: of a cluster that is started on this machine."""
    ray_workers: Annotated[int | None, option(default="1")] = None
    """Processes of each judge, each with a GPU where the cluster has any."""


@dataclass(frozen=True)
class Serve:
    """Answer trainers that ask a judge for rewards over HTTP: verl-omni, UniRL and Flow-Factory.

    Ctrl-C or SIGTERM ends it: new work is refused, and what was taken is finished. It needs fastapi and uvicorn:
    pip install "prism-video[serve]"; for --ray pip install "prism-video[serve-ray]".
    """

    host: Annotated[str, option("ADDRESS")] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    token_file: Annotated[Path | None, option("FILE", f"the variable {TOKEN}, else no token")] = None
    """File with a token that clients must send."""
    config: Annotated[Path | None, option("FILE", "")] = None
    """YAML or JSON file of options; flags override it."""
    size: Size = Size()
    scores: Scores = Scores()
    queue: Queue = Queue()
    several: Spread = Spread()
    models: Judged = field(default_factory=Judged)

    def main(self) -> int:
        """Serve until a signal comes."""
        return run(self)


def run(config: Serve) -> int:
    """Load the judges, say where they are served, and serve until a signal comes."""
    from prism.rewards.worker import Batching
    from prism.serving.process import is_loopback
    from prism.serving.server import Limits

    queue = config.queue
    wait = number("--max-wait-ms", queue.max_wait_ms, 0, 60_000) / 1000
    whole("--max-batch-size", queue.max_batch_size, 1, 4096)
    batching = Batching(queue.max_batch_size, wait, queue.max_queue, queue.max_queue_seconds)
    body = whole("--max-body-mb", queue.max_body_mb, 1, 16_384) * 2**20
    limits = Limits(body, 4 * body, queue.max_elements, queue.body_seconds)
    token = token_of(config.token_file)
    entries = dict(entries_of(config))
    config.several.check()
    service = _cluster if config.several.ray is not None else _process
    running = service(config, entries, batching, limits, token)

    def say() -> None:
        for name, facts in running.facts().items():
            print(f"{name}: {facts['judge']} judge of {facts['backbone']}, reward {facts['reward']}")
        print(f"listening on {running.url}", flush=True)
        if not is_loopback(config.host) and token is None:
            print(
                f"prism: warning: everyone who reaches {config.host} may use this service; give --token-file",
                file=sys.stderr,
            )

    running.run(say)
    print("prism: stopped; all that was taken is answered", file=sys.stderr)
    return 0


def _process(config: Serve, entries: Mapping[str, Any], batching: Any, limits: Any, token: str | None) -> Any:
    """The service in this process."""
    from prism.serving.judges import load
    from prism.serving.process import Running, bind
    from prism.serving.service import Service

    bound = bind(config.host, config.port)
    return Running(Service(*load(entries), batching), bound, token, limits)


def _cluster(config: Serve, entries: Mapping[str, Any], batching: Any, limits: Any, token: str | None) -> Any:
    """The service in processes of a Ray cluster."""
    from prism.loading import absolute
    from prism.serving.cluster import Cluster
    from prism.serving.judges import load

    loads, gpus = {}, []
    for name, entry in entries.items():
        device = entry.get("device")
        if device not in (None, "cpu", "cuda"):
            raise PrismError(
                f"The judge {name} has the device {quoted(str(device), 40)}; Ray gives each process a GPU of its own, "
                "so with --ray choose cuda or cpu."
            )
        gpus += [] if device == "cpu" else [name]
        loads[name] = partial(
            load, {name: {**entry, **{key: absolute(entry.get(key)) for key in ("head", "backbone")}}}
        )
    several, where = config.several, (config.host, config.port)
    return Cluster(loads, several.ray or "local", several.ray_workers or 1, gpus, *where, token, limits, batching)


def token_of(file: Path | None) -> str | None:
    """The token in a file, or in the environment; None where neither is there."""
    if file is None:
        token = os.environ.get(TOKEN) or None
        where = f"The variable {TOKEN}"
    else:
        where = f"The --token-file {quoted(str(file), 200)}"
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise PrismError(
                f"{where} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}."
            ) from error
    if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token):
        raise PrismError(f"{where} must hold a token of 8 or more letters, digits and signs on one line.")
    return token


def entries_of(config: Serve) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of each judge: those of --judges over those of the flags."""
    from prism.serving.judges import ALONE

    models, scores = config.models, config.scores
    flags = {
        **{name: getattr(models, name) for name in ("head", "backbone", "device", "dtype")},
        **{name: getattr(scores, name) for name in ("dimension", "draws", "seed")},
        "levels": None if scores.levels is None else list(levels_of("--t", scores.levels)),
        "call": {name: value for name, value in asdict(config.size).items() if value is not None},
    }
    if models.judges is None:
        yield ALONE, flags
        return
    for name in ("head", "backbone"):
        if flags[name] is not None:
            raise PrismError(f"The --judges name heads and backbones; leave --{name} out.")
    file = f"The --judges {quoted(str(models.judges), 200)}"
    for name, entry in read_judges(models.judges, file).items():
        yield name, {**flags, **entry, "call": {**flags["call"], **entry.get("call", {})}}


def read_judges(path: Path, file: str) -> dict[str, dict[str, Any]]:
    """The entries of a file of judges. `file`: what it is, for errors."""
    import yaml

    from prism.serving.judges import FIELDS

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PrismError(f"{file} cannot be read: {getattr(error, 'strerror', '') or quoted(error, 160)}.") from error
    if not isinstance(document, Mapping) or not document:
        raise PrismError(f"{file} must hold judges by name, such as wan: {{head: FOLDER, backbone: FOLDER}}.")
    judges = {}
    for name, entry in document.items():
        entry = {} if entry is None else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("call", {}), Mapping):
            raise PrismError(f"{file}: the judge {quoted(str(name), 60)} must have settings by name.")
        for key in entry:
            if key not in FIELDS:
                raise PrismError(f"{file}: a judge has no {quoted(str(key), 60)}; it has {', '.join(FIELDS)}.")
        judges[str(name)] = dict(entry)
    return judges
