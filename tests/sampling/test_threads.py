"""One pipeline used from two places at once: who comes second waits, and nothing of ours is left or heard elsewhere."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, WanPipeline
from tests import tiny
from tests.machinery import CALL, seeded, stock
from tests.works import works
from tests.zoo import VARIANTS

import prism
from prism.backbone import Backbone
from prism.backbone.wrapping import held
from prism.errors import PrismError
from prism.judge import Judge

PROMPTS = [tiny.PROMPT, tiny.OTHER_PROMPT, "a cat runs", "a green circle moves up"]


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 16, 3, 4, 4, generator=seeded(seed))


def leftovers(pipe: Any) -> list[str]:
    """What of ours still stands on a pipeline's parts."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    wrapped = [type(m).__name__ for part in parts for m in part.modules() if vars(m).get("_compiled_call_impl")]
    return wrapped + [name for part in (pipe.scheduler, pipe.vae) for name in ("step", "decode") if name in vars(part)]


def jobs(judges: list[Any]) -> list[Callable[[], torch.Tensor]]:
    """Scores, searches, conditionings and latents, of each judge's pipeline in turn."""
    found: list[Callable[[], torch.Tensor]] = []
    for place in range(8):
        judge, prompt = judges[place % len(judges)], PROMPTS[place % 4]
        pipe, backbone = judge.backbone.pipe, judge.backbone
        found += [
            lambda j=judge, p=prompt, s=place: j.score(latents(s), p, 700.0, **CALL),
            lambda j=judge, p=prompt, s=place: j.score_clean(latents(s), p, 500.0, **CALL)[0],
            lambda b=backbone, p=prompt: b.condition([p], **CALL).arguments["encoder_hidden_states"],
            lambda b=backbone, s=place: b.decode(latents(s)),
        ]
        if place % 3 == 0:
            found.append(
                lambda pipe=pipe, j=judge, p=prompt, s=place: (
                    prism.best_of_n(pipe, j, p, n=3, seed=s, schedule=[(2, 1)], batch_size=2, **CALL).latents
                )
            )
    return found


@works(
    "Threads and processes",
    "search and score with one pipeline from several threads",
    "exact",
    "One search at a time: who comes second waits, also where two pipelines share a part.",
)
@pytest.mark.parametrize("shared", ["one pipeline", "one denoiser in two pipelines"])
def test_threads_find_what_one_finds(shared: str) -> None:
    pipe = tiny.wan("unipc")
    pipes = [pipe] if shared == "one pipeline" else [pipe, WanPipeline(**pipe.components)]
    judges = [Judge.untrained(each, tap=2, dim=16) for each in pipes]
    plain = stock(pipe, 7)
    expected = [job() for job in jobs(judges)]
    judges = [Judge.untrained(each, tap=2, dim=16) for each in pipes]  # which have captured nothing yet
    with ThreadPoolExecutor(4) as pool:
        found = [future.result(120) for future in [pool.submit(job) for job in jobs(judges)]]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not leftovers(pipe)
    assert all(torch.equal(stock(each, 7), plain) for each in pipes)


@works(
    "Threads and processes",
    "call the denoiser from another thread while a search runs",
    "exact",
    "That call is neither recorded nor stopped. Two stock calls at once share a scheduler: unsafe by itself.",
)
def test_another_threads_denoiser_call_is_let_pass() -> None:
    pipe = tiny.wan("unipc")
    judge = Judge.untrained(pipe, tap=2, dim=16)
    arguments = Backbone(pipe).condition([tiny.OTHER_PROMPT], **CALL).call(latents(), torch.tensor([500.0]))
    expected, others = pipe.transformer(**arguments)[0], []
    pool = ThreadPoolExecutor(1)

    def foreign(*_: Any) -> None:
        others.append(pool.submit(lambda: pipe.transformer(**arguments)[0]).result(60))

    options: dict[str, Any] = {"n": 3, "seed": 5, "batch_size": 1, "schedule": [(2, 2), (3, 1)], **CALL}
    alone = prism.best_of_n(pipe, judge, tiny.PROMPT, **options)
    handle = pipe.transformer.blocks[0].register_forward_pre_hook(
        lambda *_: foreign() if threading.current_thread() is threading.main_thread() else None
    )
    try:
        beside = prism.best_of_n(pipe, judge, tiny.PROMPT, **options)
        judge.score(latents(), tiny.PROMPT, 700.0, **CALL)
    finally:
        handle.remove()
        pool.shutdown()
    assert len(others) > 10
    assert all(torch.equal(other, expected) for other in others)
    assert (beside.scores, beside.ledger.denoiser_rows) == (alone.scores, alone.ledger.denoiser_rows)
    assert torch.equal(beside.latents, alone.latents)


@works(
    "Callbacks and guidance",
    "score with a judge inside one's own callback, or search again there",
    "exact",
    "The search around it goes on as if nothing had been asked.",
)
def test_a_judge_reads_inside_the_callback() -> None:
    pipe = tiny.wan("unipc")
    judge = Judge.untrained(pipe, tap=2, dim=16)
    read: list[torch.Tensor] = []

    def ask(_pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        t = float(pipe.scheduler.timesteps[min(step + 1, len(pipe.scheduler.timesteps) - 1)])
        read.append(judge.score(tensors["latents"], tiny.PROMPT, t, **CALL))
        read.append(judge.score(tensors["latents"], f"a cat runs {step}", t, **CALL))  # which is captured anew
        if step == 1:
            inner = prism.best_of_n(pipe, judge, tiny.OTHER_PROMPT, n=2, schedule=[(2, 1)], **CALL)
            assert torch.equal(inner.latents, within)
        return {}

    within = prism.best_of_n(pipe, judge, tiny.OTHER_PROMPT, n=2, schedule=[(2, 1)], **CALL).latents
    for options in ({"schedule": [(3, 1)]}, {"strategy": "full"}, {"strategy": "none"}):
        search: dict[str, Any] = {"n": 3, "seed": 5, "batch_size": 1, **options, **CALL}
        alone = prism.best_of_n(pipe, judge, tiny.PROMPT, **search)
        read.clear()
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, callback_on_step_end=ask, **search)
        inside = list(read)
        assert len(inside) == 2 * CALL["num_inference_steps"]
        assert torch.equal(result.latents, alone.latents)
        assert torch.equal(result.latents, stock(pipe, result.seed))
        read.clear()
        assert torch.equal(stock(pipe, result.seed, callback_on_step_end=ask), alone.latents)
        assert all(torch.equal(one, other) for one, other in zip(inside, read, strict=True))
    assert not leftovers(pipe)


class Odd(BaseException):
    """As KeyboardInterrupt and SystemExit are."""


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), Odd()])
def test_nobody_waits_for_a_search_that_failed(error: BaseException) -> None:
    pipe = tiny.wan("euler")
    judge = Judge.untrained(pipe, tap=2, dim=16)

    def fail(*_: Any) -> None:
        raise error

    handle = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    for strategy in ("early", "full"):
        with pytest.raises(type(error)):
            prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, strategy=strategy, **CALL)
    handle.remove()
    assert not leftovers(pipe)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(judge.score, latents(), tiny.PROMPT, 700.0, **CALL).result(60)


def test_threads_that_would_wait_for_each_other_are_told() -> None:
    first, second = tiny.wan("euler"), tiny.wan("euler", seed=1)
    both, errors = threading.Barrier(2), []

    def work(own: Any, other: Any) -> None:
        with held(own):
            both.wait(60)
            try:
                with held(other):
                    pass
            except PrismError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=work, args=pair) for pair in ((first, second), (second, first))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(errors) == 1
    assert "waits for the first" in errors[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_does_not_wait_for_its_parents_search() -> None:
    pipe = tiny.wan("euler")
    entered, done = threading.Event(), threading.Event()

    def work() -> None:
        with held(pipe):
            entered.set()
            done.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait(60)
    child = os.fork()
    if child == 0:
        with held(pipe):
            os._exit(7)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 7


@works(
    "Callbacks and guidance",
    "a guider that guides some of the steps (`ClassifierFreeGuidance(start=0.3)`)",
    "exact",
    "What a call leaves on the guider is put back before the next one.",
)
@pytest.mark.parametrize(
    ("variant", "span"),
    [
        ("hunyuan15", {"start": 0.3}),
        ("hunyuan15", {"start": 0.2, "stop": 0.7}),
        ("motif_video", {"stop": 0.5}),  # a later start fails in the stock pipeline itself
    ],
)
def test_guidance_on_part_of_the_steps(variant: str, span: dict[str, float]) -> None:
    def build() -> Any:
        pipe, call = VARIANTS[variant]()
        pipe.guider = ClassifierFreeGuidance(guidance_scale=4.0, **span)
        return pipe, {**call, "output_type": "latent"}

    pipe, call = build()
    judge = Judge.untrained(pipe, tap=1, dim=16)
    before = vars(pipe.guider).copy()
    for options in ({"schedule": [(2, 2), (5, 1)]}, {"strategy": "full"}, {"strategy": "draft", "draft_steps": 3}):
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=1, **options, **call)
        assert vars(pipe.guider) == before
        plain = build()[0](tiny.PROMPT, generator=seeded(result.seed), **call)[0]
        assert torch.equal(result.video, plain[0])


@works(
    "Threads and processes",
    "a plain call in another thread, on a copy of the pipeline with its own scheduler, while a search runs",
    "exact",
    "Both give what they give alone.",
)
def test_plain_calls_beside_a_search() -> None:
    pipe = tiny.wan("unipc")
    judge = Judge.untrained(pipe, tap=2, dim=16)
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    expected, plain = [stock(pipe, seed) for seed in range(6)], []
    alone = prism.best_of_n(pipe, judge, tiny.PROMPT, n=4, seed=5, batch_size=2, **CALL)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(lambda: [plain.append(stock(other, seed)) for seed in range(6)])
        found = [prism.best_of_n(pipe, judge, tiny.PROMPT, n=4, seed=5, batch_size=2, **CALL) for _ in range(2)]
        beside.result(120)
    assert all(torch.equal(one, two) for one, two in zip(plain, expected, strict=True))
    for result in found:
        assert torch.equal(result.latents, alone.latents)
        assert result.ledger.denoiser_rows == alone.ledger.denoiser_rows
        assert result.ledger.text_encodings == alone.ledger.text_encodings
