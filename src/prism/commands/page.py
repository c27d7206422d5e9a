"""`prism page`: generate, score, compare and annotate in a browser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prism.commands.options import Repeated, Replacing, Seed, option
from prism.commands.sample import Call, Loaded, Sample, Sampling, parse_weights
from prism.commands.sample import run as sample
from prism.errors import SEEDS, PrismError, number, quoted, whole


@dataclass(frozen=True)
class Annotating:
    """Pairs for people to compare."""

    pairs: Annotated[Path | None, option("PATH", "those of the embedded candidates")] = None
    """A store, a folder of clips with prompts in text files of their names, or a table with path_A, path_B, prompt."""
    dimensions: Annotated[str, option("NAME,NAME")] = "overall"
    """Questions that are asked per pair, such as VQ,MQ,TA."""
    answers: Annotated[Path | None, option("FILE.csv", "answers.csv beside the clips")] = None
    """The CSV of answers, in VideoAlign's columns; a page goes on where it ends."""
    repeats: float = 0.05
    """Share of the pairs that an annotator is asked again, unsaid; their answers stand in NAME-again.csv."""
    pairs_per_prompt: Annotated[int | None, option("INT", "all")] = None
    """Random pairs of each prompt's clips."""
    split: Annotated[str | None, option("NAME", "all")] = None
    """Videos of this split of a store alone."""


@dataclass(frozen=True)
class Page:
    """Open the page: generate with early Best-of-N, score and compare clips, annotate pairs, in a browser.

    It is reached from this machine alone, unless --host and --auth say otherwise. Nothing is fetched from elsewhere.
    """

    out: Annotated[Path, option("FOLDER")] = Path("runs/page")
    """Folder of the runs, each as prism sample makes it, and of clips for annotation."""
    tabs: Annotated[str, option("NAME,NAME")] = "generate,score,compare,annotate"
    """Tabs to show. With annotate alone, and clips that are files, no model is loaded."""
    host: Annotated[str, option("ADDRESS")] = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine's."""
    port: Annotated[int, option("PORT")] = 7860
    """Port to listen at; 0 takes a free one."""
    auth: Annotated[tuple[str, ...], Repeated, option("USER:PASS|FILE")] = ()
    """A user with a password, or a file with one per line; the answers of Annotate are then under these names."""
    seed: Seed = 0
    config: Annotated[Path | None, option("FILE", "")] = None
    """YAML or JSON file of options; flags override it."""
    annotate: Annotating = field(default_factory=Annotating)
    models: Sampling = field(default_factory=Sampling)

    def main(self) -> None:
        """Serve the page until it is interrupted."""
        server, jobs = started(self)
        print(f"The page is at {server.url} (Ctrl-C ends it).", flush=True)
        try:
            server.wait()
        finally:
            server.stop()
            if jobs is not None:
                jobs.close()


def started(config: Page) -> tuple[Any, Any]:
    """The server of the page, which listens, and its queue of runs (None without the tab generate)."""
    from prism.serving import page, web

    tabs = _tabs(config.tabs, page.TABS)
    users = web.users_of(config.auth, config.host)
    port = whole("--port", config.port, 0, 65_535)
    page.imported()
    desk = desk_of(config, tabs)
    server = web.Server(page.application(desk, tabs, users), config.host, port)
    return server.start(), desk.jobs


def desk_of(config: Page, tabs: tuple[str, ...]) -> Any:
    """The models, runs and pairs that the tabs need."""
    from prism.loading import load_backbone, load_judge
    from prism.serving.jobs import Jobs, seen_cut
    from prism.serving.page import Desk
    from prism.training.annotation import check_questions

    whole("--seed", config.seed, 0, SEEDS)
    options, models, annotates = config.annotate, config.models, "annotate" in tabs
    pairs = options.pairs
    number("--repeats", options.repeats, 0, 1)
    if options.pairs_per_prompt is not None:
        whole("--pairs-per-prompt", options.pairs_per_prompt)
    if config.out.exists() and not config.out.is_dir():
        raise PrismError(f"The --out {quoted(str(config.out), 200)} is a file; name a folder for the runs.")
    if options.answers is not None and options.answers.suffix.lower() != ".csv":
        raise PrismError(f"The --answers {quoted(str(options.answers), 200)} must end in .csv.")
    if annotates:
        check_questions(_questions(options))
    of_store = annotates and (pairs is None or (pairs / "store.json").is_file())
    desk = Desk("Annotation")
    if of_store or tabs != ("annotate",):
        backbone, call, name = load_backbone(models.backbone, models.device, models.dtype, models.offload, models.loras)
        judge = None
        if tabs != ("annotate",):
            judge = load_judge(models.head, backbone, embedded=models.backbone is None)
        desk = Desk(name, backbone, judge, call)
    if annotates:
        _put_pairs(desk, config, of_store)
    if "generate" in tabs:
        loaded = Loaded(desk.backbone, desk.call, desk.title, desk.judge)
        desk.jobs = Jobs(config.out, partial(_make, loaded, models), partial(_seen, seen_cut, desk.judge), desk.lock)
        desk.examples = _examples() if models.backbone is None else ()
    return desk


def _put_pairs(desk: Any, config: Page, of_store: bool) -> None:
    """The pairs to annotate, and their answers, into the desk."""
    from prism.loading import check_store, open_store
    from prism.serving import comparisons
    from prism.serving.annotators import Annotation

    options = config.annotate
    if of_store:
        store = open_store(options.pairs)
        check_store(options.pairs, store, desk.backbone)
        desk.comparisons = comparisons.of_store(
            *(store, desk.backbone, config.out / "annotate", options.split, options.pairs_per_prompt, config.seed),
            lock=desk.lock,
        )
    elif options.split is not None:
        raise PrismError("The --split is one of a store, and --pairs names none; leave it out.")
    else:
        assert options.pairs is not None
        desk.comparisons = comparisons.opened(options.pairs, options.pairs_per_prompt, config.seed)
        for why, count in desk.comparisons.left_out.items():
            print(f"prism: {count:,} left out: {why}.")
    path = desk.comparisons.root / "answers.csv" if options.answers is None else options.answers
    root, questions = desk.comparisons.root, _questions(options)
    desk.annotation = Annotation(desk.comparisons.pairs, path, questions, options.repeats, config.seed, root)


def _questions(options: Annotating) -> tuple[str, ...]:
    return tuple(name.strip() for name in options.dimensions.split(",") if name.strip())


def _make(loaded: Loaded, models: Sampling, wish: Any, folder: Path, watch: Any) -> Mapping[str, Any]:
    """Make a run's folder, as prism sample does."""
    call = {name: value for name, value in wish.call.items() if value is not None}
    if wish.image is not None:
        call["image"] = wish.image
    how: dict[str, Any] = {"n": wish.n, "schedule": wish.schedule or None, "look": wish.look}
    if wish.budget is not None:
        how = {"budget": f"{wish.budget:g}"}
    config = Sample(
        output=Replacing(folder),
        prompt=wish.prompt or None,
        seed=str(wish.seed),
        select_by=wish.select_by,
        models=models,
        call=Call(**call),
        **how,
    )
    metrics = sample(config, loaded, watch)
    assert metrics is not None
    return metrics


def _seen(describe: Any, judge: Any, wish: Any, cut: Mapping[str, Any], previews: Mapping[Any, Any]) -> Any:
    from prism.sampling import ranking

    weights = parse_weights(wish.select_by)
    return describe(judge, ranking(judge, "overall") if weights == {"overall": 1.0} else weights, cut, previews)


def _tabs(text: str, names: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    wrong = [name for name in chosen if name not in names]
    if wrong or not chosen:
        raise PrismError(f"The --tabs are {quoted(text, 80)}; choose of {', '.join(names)}.")
    return chosen


def _examples() -> tuple[str, ...]:
    """Prompts that the embedded model knows."""
    from prism import shapeworld

    return tuple(shapeworld.prompts("test")[:4])
