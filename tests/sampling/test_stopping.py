"""`listen(..., reject=...)`: a plain call whose videos are lost ends at the step that the judge's reference says."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.machinery import seeded
from tests.sampling.conftest import Setting
from tests.sampling.test_listening import PROMPTS, left
from tests.sampling.test_steps import Counter, build, plain

import prism
from prism import Judge, PrismError, Rejected
from prism.judge.reference import Reference
from prism.preference.pairs import prompt_key
from prism.sampling import Reject

COLUMN = 3  # of "overall"


def reference_of(judge: Judge, scores: Any, levels: Any = (0.0, 1000.0), **facts: Any) -> Reference:
    """A reference with the same clips (clips, num_dimensions) at all levels."""
    table = np.repeat(np.asarray(scores, float)[None], len(levels), 0)
    return Reference(tuple(levels), judge.dimensions, table, table * 0, ("key",) * table.shape[1], facts)


def probabilities(judge: Judge, scores: Any, rivals: Any) -> Any:
    """Eq. 3-4 written out: P(preferred) + P(tie) / 2 over the rivals, (rows,)."""
    odds = np.exp(np.asarray(scores, float)[:, None, COLUMN] - np.asarray(rivals, float)[None, :, COLUMN])
    wins, losses = odds / (odds + judge.eta), 1 / (1 + judge.eta * odds)
    return (wins + (1 - wins - losses) / 2).mean(1)


def heard(judge: Judge, setting: Setting, prompts: Any, seeds: Any) -> list[Any]:
    call = {**setting.call, "output_type": "latent"}
    with prism.listen(judge, setting.pipe) as scores:
        setting.pipe(prompts, generator=[seeded(seed) for seed in seeds], **call)
    return list(scores)


def test_a_lost_call_ends_at_the_step_that_the_reference_says(setting: Setting) -> None:
    judge, seeds = setting.judge(2), [3, 4]
    entries = heard(judge, setting, PROMPTS, seeds)
    rivals = np.concatenate([entry.scores.double().numpy() for entry in entries[:3]])
    best = [float(probabilities(judge, entry.scores, rivals).max()) for entry in entries]
    stop = min(range(2, 6), key=best.__getitem__)  # a step after the first two, at which the best is at its lowest
    below, expected = best[stop] + 1e-6, next(k for k in range(1, 6) if best[k] < best[stop] + 1e-6)
    judge.reference = reference_of(judge, rivals)
    setting.stock(0)
    counter = Counter(setting.pipe)
    before = left(setting.pipe)
    call = {**setting.call, "output_type": "latent"}
    with prism.listen(judge, setting.pipe, reject=Reject(below, steps=(2, 6))) as scores:
        with pytest.raises(Rejected) as caught:
            setting.pipe(PROMPTS, generator=[seeded(seed) for seed in seeds], **call)
        assert [entry.step for entry in scores] == list(range(1, expected + 2))
        saved = 2 if setting.name.startswith("wan") else 0  # rows of its last step's unconditional pass
        assert counter.rows == 2 * 2 * (expected + 1) - saved
    assert (caught.value.step, caught.value.t) == (expected + 1, entries[expected].t)
    assert caught.value.probability == pytest.approx(best[expected], abs=1e-4)
    assert f"at step {expected + 1} " in str(caught.value)
    assert torch.equal(setting.pipe(tiny.PROMPT, generator=seeded(0), **call)[0], setting.stock(0)[1])
    assert left(setting.pipe) == before


def test_one_video_that_is_not_lost_keeps_the_call(wan: Setting) -> None:
    judge = wan.judge(2)
    last = heard(judge, wan, PROMPTS, [3, 4])[-1].scores.double().numpy()
    middle = last.mean(0)
    judge.reference = reference_of(judge, [middle, middle])
    low, high = sorted(probabilities(judge, last, [middle]))
    call = {**wan.call, "output_type": "latent"}
    for below, ends in (((low + high) / 2, False), (high + 1e-5, True)):
        with prism.listen(judge, wan.pipe, reject=Reject(below, steps=(6, 6))) as scores:
            if not ends:
                wan.pipe(PROMPTS, generator=[seeded(3), seeded(4)], **call)
            else:
                with pytest.raises(Rejected):
                    wan.pipe(PROMPTS, generator=[seeded(3), seeded(4)], **call)
        assert len(scores) == 6


@pytest.mark.parametrize("name", ["hunyuan15", "skyreels_v2_df"])
def test_the_next_call_is_a_plain_one(name: str) -> None:
    """Guiders, and schedulers that are copied: what a call that was given up leaves is reset."""
    pipe, call = build(name)
    judge = Judge.untrained(pipe, dim=16)
    expected = plain(pipe, call, 5)
    judge.reference = reference_of(judge, np.full((2, 4), 1e3))
    with prism.listen(judge, pipe, reject=0.5) as scores:
        for seed in (1, 2):
            with pytest.raises(Rejected):
                plain(pipe, call, seed)
    assert [entry.step for entry in scores] == [1, 1]
    assert torch.equal(plain(pipe, call, 5), expected)


def test_a_call_is_compared_with_those_heard_before(wan: Setting) -> None:
    judge, call = wan.judge(2), {**wan.call, "output_type": "latent"}
    assert judge.reference is None
    entries = {seed: heard(judge, wan, tiny.PROMPT, [seed])[-1].scores.double().numpy() for seed in range(6)}
    rivals: list[Any] = []
    ends: list[bool] = []
    with prism.listen(judge, wan.pipe, reject=Reject(0.5, against="heard", steps=(6, 6))):
        for seed in range(6):
            lost = len(rivals) >= 4 and probabilities(judge, entries[seed], np.concatenate(rivals))[0] < 0.5
            caught: list[float] = []
            try:
                wan.pipe(tiny.PROMPT, generator=seeded(seed), **call)
            except Rejected as rejected:
                caught.append(rejected.probability)
            expected = [probabilities(judge, entries[seed], np.concatenate(rivals))[0]] if lost else []
            assert caught == pytest.approx(expected, abs=1e-4)
            rivals.append(entries[seed])
            ends.append(lost)
    assert len(set(ends)) == 2, "both happen"


def test_it_decides_where_the_reference_and_the_head_s_accuracy_let_it(wan: Setting) -> None:
    judge, call = wan.judge(2), {**wan.call, "output_type": "latent"}
    levels = [entry.t for entry in heard(judge, wan, tiny.PROMPT, [0])]
    lost = np.full((2, 4), 1e3)

    def step(rule: Any) -> int:
        with pytest.raises(Rejected) as caught, prism.listen(judge, wan.pipe, reject=rule):
            wan.pipe(tiny.PROMPT, generator=seeded(0), **call)
        return caught.value.step

    judge.reference = reference_of(judge, lost, [levels[2], levels[4]])
    assert step(0.5) == 3
    assert step(Reject(0.5, levels=(0, levels[3]))) == 4
    assert step(Reject(0.5, steps=(5, 6))) == 5
    row = {"dimension": "overall", "pairs": 9, "prompts": 9, "set": "test", "without_ties": 0.6}
    intervals = zip(levels, [(0.5, 0.7)] * 3 + [(0.51, 0.7)] * 3)
    judge._evaluation = [{**row, "t": t, "without_ties_ci95": list(ci)} for t, ci in intervals], judge._evaluation[1]
    assert step(0.5) == 4
    assert step(Reject(0.5, levels=(0, 1000))) == 3
    judge.reference = reference_of(judge, lost, [levels[2]])
    with pytest.raises(PrismError, match="no better than chance on overall at all levels of its reference"):
        step(0.5)
    judge.reference = reference_of(judge, lost, [levels[4]])
    with pytest.warns(UserWarning, match="No call was given up: reject decides at t from"):
        with prism.listen(judge, wan.pipe, reject=Reject(0.5, steps=(6, 6))):
            wan.pipe(tiny.PROMPT, generator=seeded(0), **call)


def test_a_reference_that_tells_prompts_apart_is_warned_of_but_for_the_prompt_s_own_clips(wan: Setting) -> None:
    judge = wan.judge(2)
    reference = reference_of(judge, np.full((5, 4), 1e3), between_prompts={"0": {"overall": 0.8}, "1000": None})
    judge.reference = reference
    with pytest.warns(UserWarning, match="fewer than 4 clips to compare with, and 80% of the variance of overall"):
        with prism.listen(judge, wan.pipe, reject=0.5):
            pass
    keys = (prompt_key(tiny.PROMPT),) * 4 + ("key",)
    judge.reference = Reference(reference.levels, judge.dimensions, reference.scores, reference.errors, keys, {})
    with pytest.raises(Rejected), prism.listen(judge, wan.pipe, reject=Reject(0.5, prompt=tiny.PROMPT)):
        wan.pipe(tiny.PROMPT, generator=seeded(0), **wan.call)


def test_what_is_not_finite_is_lost(wan: Setting) -> None:
    judge = wan.judge(2)
    judge.reference = reference_of(judge, np.full((2, 4), -1e3))  # nothing else would lose

    def spoil(_pipe: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * (math.nan if step == 2 else 1)}

    with pytest.raises(Rejected) as caught, prism.listen(judge, wan.pipe, reject=0.2):
        wan.pipe(tiny.PROMPT, generator=seeded(0), **{**wan.call, "callback_on_step_end": spoil})
    assert (caught.value.step, caught.value.probability) == (4, 0)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (0, "reject must be a number above 0, at most 1; found 0"),
        (1.0, "reject must be a probability above 0 and below 1; found 1.0"),
        ("0.3", "reject must be a number"),
        (math.nan, "reject must be a number"),
        (True, "reject must be a number"),
        (
            Reject(0.3, by="beauty"),
            "reject decides by one dimension of the judge, which has VQ, MQ, TA, overall; found",
        ),
        (Reject(0.3, against="luck"), "against must be one of reference, heard; found luck"),  # type: ignore[arg-type]
        (Reject(0.3, levels=(700, 300)), "levels must be two noise levels, the lower one first"),
        (Reject(0.3, levels=(900, 950)), "levels must be two noise levels.* from 400 to 600"),
        (Reject(0.3, levels=5), r"levels must be a pair \(first, last\); found 5"),  # type: ignore[arg-type]
        (Reject(0.3, steps=(0, 3)), "The first of steps must be a whole number"),
        (Reject(0.3, steps=(4, 3)), "steps must be two steps, the earlier one first"),
    ],
)
def test_rules_that_cannot_be_are_refused(wan: Setting, rule: Any, sentence: str) -> None:
    judge = wan.judge(2)
    judge.reference = reference_of(judge, np.zeros((2, 4)), (400, 600))
    with pytest.raises(PrismError, match=sentence), prism.listen(judge, wan.pipe, reject=rule):
        raise AssertionError("it was let in")
    judge.reference = None
    if sentence.startswith("against"):
        with pytest.raises(PrismError, match="this judge has none; make one with prism reference --head FOLDER"):
            with prism.listen(judge, wan.pipe, reject=0.3):
                pass


def test_the_loop_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "prism.Rejected" in code)
    pipe = tiny.wan("unipc")
    judge = Judge.untrained(pipe, dim=16)
    judge.reference = reference_of(judge, np.full((2, 4), 1e3))
    names = {"prism": prism, "torch": torch, "pipe": pipe, "judge": judge, "prompt": tiny.PROMPT}
    exec(compile(code, "judge.md", "exec"), {**names, "call": tiny.CALL_WAN})
