"""Scores of finished clips, and their place in a reference: by hand, by numpy, by brute force; files that lie."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import stores, tiny
from tests.zoo.latte_to_qwen import ltx_i2v, svd

from prism.backbone import Backbone
from prism.clips import FramePolicy, read_clip
from prism.errors import PrismError
from prism.judge import Judge
from prism.judge.objective import log_probabilities
from prism.judge.reference import ENOUGH, Reference, between_groups, measure
from prism.judge.scoring import content_key, default_levels, noise, score_latents
from prism.preference.pairs import prompt_key
from prism.video import frames, write_video

CALL = tiny.CALL_WAN
DIMENSIONS = ("VQ", "MQ")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny.wan())


def judge_on(backbone: Backbone) -> Judge:
    judge = Judge.untrained(backbone, tap=2, dim=16, dimensions=DIMENSIONS)
    judge._random = None  # as if trained: no warning
    return judge


@pytest.fixture(scope="module")
def judge(backbone) -> Judge:
    return judge_on(backbone)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for place in range(3):
        write_video(folder / f"{place}.mp4", rng.uniform(size=(9 + place, 32, 40, 3)), 8)
    return sorted(folder.glob("*.mp4"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stores.make(tmp_path_factory.mktemp("store") / "store")


def test_a_clips_score_is_that_of_its_encoded_latent(judge, backbone, clips):
    policy = FramePolicy(num_frames=9, height=32, width=32)
    scored = judge.score_video([str(clip) for clip in clips], tiny.PROMPT, [700, 300.5, 0], 3, 5, **CALL)
    assert scored.levels == (700, 300.5, 0)
    for row, clip in enumerate(clips):
        pixels = read_clip(str(clip), policy).frames
        latent = backbone.encode(pixels[None])
        for column, t in enumerate(scored.levels):
            drawn = [noise(latent.shape[1:], 5, content_key(pixels), t, draw)[None] for draw in range(3)]
            noisy = [backbone.add_noise(latent, t, each) for each in drawn]
            by_hand = np.stack([judge.score(each, tiny.PROMPT, t, **CALL)[0].double().numpy() for each in noisy])
            np.testing.assert_allclose(scored.scores[row, column], by_hand.mean(0), atol=2e-5)
            error = by_hand.std(0, ddof=1) / math.sqrt(3) if t else np.zeros(2)
            np.testing.assert_allclose(scored.errors[row, column], error, atol=2e-5)
            assert (scored.errors[row, column] > 1e-4).all() or not t
    assert scored.percentiles is None
    assert judge.score_video(clips[0], tiny.PROMPT, 300, 1, **CALL).errors.isnan().all()


def test_scores_depend_on_content_and_seed_and_nothing_beside(judge, clips, tmp_path):
    names = [str(clip) for clip in clips]
    whole = judge.score_video(names, [tiny.PROMPT, tiny.OTHER_PROMPT, tiny.PROMPT], 500, **CALL).scores
    turned = judge.score_video(names[::-1], [tiny.PROMPT, tiny.OTHER_PROMPT, tiny.PROMPT], 500, **CALL).scores
    torch.testing.assert_close(whole, turned.flip(0), atol=1e-5, rtol=0)
    (tmp_path / "renamed.mp4").write_bytes(clips[1].read_bytes())
    pixels = read_clip(names[1], FramePolicy(num_frames=9, height=32, width=32)).frames
    for same in (tmp_path / "renamed.mp4", clips[1].read_bytes(), [pixels], frames(pixels), torch.from_numpy(pixels)):
        one = judge.score_video(same, tiny.OTHER_PROMPT, 500, batch_size=1, **CALL).scores
        torch.testing.assert_close(one, whole[1:2], atol=1e-5, rtol=0)
    other = judge.score_video(names[1], tiny.OTHER_PROMPT, 500, seed=1, **CALL).scores
    assert (other - whole[1:2]).abs().min() > 1e-4


@pytest.mark.parametrize(("make", "prompt"), [(ltx_i2v, "a cat"), (svd, "")])
def test_a_pipeline_that_starts_from_an_image_is_scored_with_it(tmp_path, make, prompt):
    pipe, call = make()
    backbone = Backbone(pipe)
    judge = judge_on(backbone)
    video = np.random.default_rng(0).uniform(size=(call["num_frames"], call["height"], call["width"], 3))
    write_video(tmp_path / "clip.mp4", video, 8)
    one = judge.score_video(tmp_path / "clip.mp4", prompt, 600, 2, **call)
    pixels = read_clip(str(tmp_path / "clip.mp4")).frames
    latent, key = backbone.encode(pixels[None]), content_key(pixels)
    assert torch.equal(one.scores, score_latents(judge, latent, [key], [prompt], [600], 2, **call)[0])
    black = {**call, "image": call["image"].point(lambda value: 0)}
    assert (one.scores - judge.score_video(tmp_path / "clip.mp4", prompt, 600, 2, **black).scores).abs().max() > 1e-6


def test_what_cannot_be_scored_is_refused(judge, clips):
    with pytest.raises(PrismError, match=r"give latents \(16, 2, 4, 4\), and the pipeline makes \(16, 3, 4, 4\)"):
        judge.score_video([np.zeros((5, 32, 32, 3), np.uint8)], tiny.PROMPT, **CALL)
    with pytest.raises(PrismError, match="found 2 prompts for 1 videos"):
        judge.score_video(clips[0], ["a", "b"], **CALL)
    with pytest.raises(PrismError, match="no video to score"):
        judge.score_video([], tiny.PROMPT, **CALL)
    with pytest.raises(PrismError, match="The noise level t must be a number from 0 to 1,000"):
        judge.score_video(clips[0], tiny.PROMPT, 1001, **CALL)
    with pytest.raises(PrismError, match=r"nothing.mp4 does not exist"):
        judge.score_video("nothing.mp4", tiny.PROMPT, **CALL)


def test_levels_are_those_that_the_head_is_best_at(backbone, store):
    judge = judge_on(backbone)
    assert default_levels(judge) == (699, 499)
    judge.trained_on = {"config": {"t_low": 0.0, "t_high": 600.0}}
    assert default_levels(judge) == (499,)
    judge.trained_on = {"config": {"t_low": 800.0, "t_high": 900.0}}
    assert default_levels(judge) == (850,)
    shares = {899: (0.6, None), 699: (0.7, 0.6), 299: (0.8, 0.8), 0: (0.5, 0.9)}
    rows = [
        {"t": t, "dimension": name, "without_ties": share}
        for t, by_name in shares.items()
        for name, share in zip(DIMENSIONS, by_name)
    ]
    judge._evaluation = rows, judge._evaluation[1]
    assert default_levels(judge) == (299, 0)
    judge.reference = measure(judge, store, levels=[850], num_draws=1, progress=False)
    assert default_levels(judge) == (850,)


# -- the reference


@pytest.fixture(scope="module")
def reference(judge, store) -> Reference:
    return measure(judge, store, "test", [700, 400], 3, 7, command="by hand", progress=False)


def test_a_reference_is_the_scores_of_a_splits_clips(judge, store, reference):
    rows = [row for row in store.videos.to_pylist() if row["split"] == "test"]
    ids, prompts = [row["video"] for row in rows], [row["prompt"] for row in rows]
    latents = store.latents(ids)
    mean, error = score_latents(judge, latents, ids, prompts, [700, 400], 3, 7, 5, **CALL)
    np.testing.assert_allclose(reference.scores, mean.transpose(0, 1), atol=2e-5)
    np.testing.assert_allclose(reference.errors, error.transpose(0, 1), atol=2e-5)
    assert reference.prompts == tuple(map(prompt_key, prompts))
    assert (reference.facts["clips"], reference.facts["prompts"], reference.facts["seed"]) == (16, 4, 7)
    assert reference.facts["store"]["name"] == "store"
    few = measure(judge, store, "test", [700], 3, 7, most=9, progress=False)
    assert {few.prompts.count(each) for each in few.prompts} == {4}  # whole prompts
    assert few.scores.shape == (1, 8, 2)
    assert set(map(tuple, few.scores[0])) <= set(map(tuple, reference.scores[0]))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.lists(st.integers(-4, 4), min_size=1, max_size=4))
def test_percentiles_are_those_of_brute_force(own, scores):
    table = np.array(own, float)[None, :, None]
    place = Reference((5.0,), ("VQ",), table, table * 0, ("k",) * len(own), {})
    expected = [100 * sum((each < score) + (each == score) / 2 for each in own) / len(own) for score in scores]
    np.testing.assert_allclose(place.percentile(np.array(scores, float)[:, None], 5)[:, 0], expected)


def test_win_probabilities_are_those_of_simulated_contests(judge, reference):
    rng = np.random.default_rng(1)
    scores, errors = np.array([[0.3, -1.0], [4.0, 0.2]]), np.array([[0.4, 0.0], [1.5, np.nan]])
    wide = Reference((700.0,), DIMENSIONS, rng.normal(0, 2, (1, 20, 2)), rng.uniform(0, 1, (1, 20, 2)), ("k",) * 20, {})
    found = wide.win_probability(judge, scores, errors, 700)
    draws = 200_000
    for row, d in np.ndindex(2, 2):
        rival = rng.integers(0, 20, draws)
        mine = scores[row, d] + np.nan_to_num(errors[row, d]) * rng.normal(size=draws)
        theirs = wide.scores[0, rival, d] + wide.errors[0, rival, d] * rng.normal(size=draws)
        odds = np.exp(mine - theirs)  # Eq. 3-4, written out
        wins, losses = odds / (odds + 5), 1 / (1 + 5 * odds)
        expected = (wins + (1 - wins - losses) / 2).mean()
        assert found[row, d] == pytest.approx(expected, abs=0.004)
    exact = Reference((700.0,), DIMENSIONS, wide.scores, wide.errors * np.nan, ("k",) * 20, {})
    p = log_probabilities(torch.from_numpy(scores[0, 0] - wide.scores[0, :, 0]), 5.0).exp()
    assert exact.win_probability(judge, scores, errors * np.nan, 700)[0, 0] == pytest.approx(
        float((p[:, 0] + p[:, 1] / 2).mean()), abs=1e-9
    )
    twin = reference.scores[0]
    against = np.mean(reference.win_probability(judge, twin, reference.errors[0], 700), 0)
    np.testing.assert_allclose(against, 0.5, atol=1e-9)  # clips against themselves


def test_a_calibrated_judge_gives_its_calibrated_probabilities(backbone, reference):
    judge = judge_on(backbone)
    scores = reference.scores[0, :1] + 1
    plain = reference.win_probability(judge, scores, scores * 0, 700)
    judge.calibration = {"VQ": {"temperature": 4.0, "eta": 5.0}}
    cooler = reference.win_probability(judge, scores, scores * 0, 700)
    assert abs(cooler[0, 0] - 0.5) < abs(plain[0, 0] - 0.5)
    assert cooler[0, 1] == plain[0, 1]


def test_a_clip_stands_among_those_of_its_own_prompt_where_there_are_enough(judge, store, reference, clips):
    judge.reference = reference
    try:
        prompt = next(row["prompt"] for row in store.videos.to_pylist() if row["split"] == "test")
        scored = judge.score_video([str(clips[0])] * 2, [f" {prompt.upper()}", "another prompt"], None, 3, **CALL)
    finally:
        judge.reference = None
    assert scored.levels == (700, 400)
    assert (scored.compared, scored.same_prompt) == ((4, 16), (True, False))
    rows = [place for place, key in enumerate(reference.prompts) if key == prompt_key(prompt)]
    assert len(rows) == ENOUGH
    for video, among in enumerate((rows, range(16))):
        for level, d in np.ndindex(2, 2):
            score, own = float(scored.scores[video, level, d]), reference.scores[level, list(among), d]
            assert float(scored.percentiles[video, level, d]) == pytest.approx(100 * float(np.mean(own < score)))
    assert ((scored.win_probabilities > 0) & (scored.win_probabilities < 1)).all()


def test_the_variance_between_prompts_is_that_of_simulated_prompts(reference):
    rng = np.random.default_rng(0)
    names = [str(place) for place in range(2000) for _ in range(3)]
    values = np.repeat(rng.normal(0, 2, 2000), 3) + rng.normal(0, 1, 6000)
    assert between_groups(values, names) == pytest.approx(0.8, abs=0.02)
    assert between_groups(values, list(map(str, range(6000)))) is None
    assert between_groups(np.ones(6000), names) is None
    assert set(reference.facts["between_prompts"]) == {"700", "400"}


def test_prompts_that_the_head_was_trained_on_are_refused(backbone, store):
    judge = judge_on(backbone)
    prompt = next(row["prompt"] for row in store.videos.to_pylist() if row["split"] == "test")
    judge.trained_on = {"prompt_keys": [prompt_key(prompt)]}
    with pytest.raises(PrismError, match="The head was trained on the prompt"):
        measure(judge, store, progress=False)
    with pytest.raises(PrismError, match="The head was trained on the prompt"):
        measure(judge, store, "all", progress=False)
    assert measure(judge, store, "train", [5], 1, progress=False).scores.shape == (1, 24, 2)
    judge.trained_on = {}
    assert measure(judge, store, "all", [5], 1, progress=False).scores.shape == (1, 52, 2)
    with pytest.raises(PrismError, match="has 0 clips in the split unseen"):
        measure(judge, store, "unseen", progress=False)


def test_a_reference_is_saved_with_the_head_until_it_is_trained_further(backbone, reference, tmp_path):
    judge = judge_on(backbone)
    judge.reference = reference
    judge.save_pretrained(tmp_path / "head")
    again = Judge.from_pretrained(tmp_path / "head", backbone)
    assert again.reference is not None
    assert np.array_equal(again.reference.scores, reference.scores)
    assert np.array_equal(again.reference.errors, reference.errors)
    assert again.reference.facts == json.loads(json.dumps(reference.facts))
    assert again.reference.prompts == reference.prompts
    with torch.no_grad():
        next(again.head.parameters()).add_(0)
    assert again.reference is None
    again.save_pretrained(tmp_path / "head", overwrite=True)
    assert not (tmp_path / "head" / "reference.json").exists()
    single = Reference((5.0,), DIMENSIONS, np.ones((1, 2, 2)), np.full((1, 2, 2), np.nan), ("k", "k"), {})
    again.reference = single
    again.save_pretrained(tmp_path / "head", overwrite=True)
    assert np.isnan(Judge.from_pretrained(tmp_path / "head", backbone).reference.errors).all()


def change(name, value):
    return lambda document: {**document, name: value}


HOSTILE = {
    "no object": (lambda _: [], "is no reference of schema 1"),
    "other format": (change("format", "prism-head"), "is no reference of schema 1"),
    "other weights": (change("weights_sha256", "0" * 64), "is of another head's weights"),
    "other dimensions": (change("dimensions", ["VQ"]), "must be the head's, VQ, MQ; found"),
    "levels as text": (change("levels", ["high", "low"]), "must be a number from 0 to 1,000"),
    "levels twice": (change("levels", [700, 700]), "must list noise levels"),
    "no facts": (change("facts", None), "'facts' .* must be an object"),
    "shares": (change("facts", {"between_prompts": {"700": 3}}), "must be an object of objects"),
    "shares as text": (change("facts", {"between_prompts": {"700": {"VQ": "x"}}}), "must be a number from 0 to 1"),
    "ragged": (change("scores", [[[1, 2], [3]], [[1, 2]]]), "must be 2 lists of two or more clips with 2 numbers"),
    "text": (change("scores", "many"), "must be 2 lists"),
    "NaN": (lambda d: {**d, "scores": [[[math.nan, 1.0]] * 16] * 2}, "must hold finite numbers"),
    "errors below 0": (lambda d: {**d, "errors": [[[-1.0, 1.0]] * 16] * 2}, "must hold a number from 0"),
    "prompts": (change("prompts", ["k"]), "must list the key of each clip's prompt"),
    "altered": (lambda d: {**d, "scores": [[[1.0, 1.0]] * 16] * 2}, "was altered"),
    "other prompts": (lambda d: {**d, "prompts": ["k"] * 16}, "was altered"),
}


@pytest.fixture(scope="module")
def saved(backbone, reference, tmp_path_factory) -> Path:
    judge = judge_on(backbone)
    judge.reference = reference
    folder: Path = tmp_path_factory.mktemp("saved") / "head"
    judge.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", HOSTILE)
def test_a_reference_that_lies_is_refused(saved, backbone, case):
    spoil, sentence = HOSTILE[case]
    path = saved / "reference.json"
    whole = path.read_text()
    try:
        path.write_text(json.dumps(spoil(json.loads(whole))))
        with pytest.raises(PrismError, match=sentence):
            Judge.from_pretrained(saved, backbone)
        path.write_text(whole[: len(whole) // 2])
        with pytest.raises(PrismError, match="is not valid JSON"):
            Judge.from_pretrained(saved, backbone)
    finally:
        path.write_text(whole)


def test_between_its_levels_a_reference_is_linear_and_beyond_them_constant(reference):
    np.testing.assert_array_equal(reference.levels, (700, 400))
    (high, low), (noise, less) = reference.scores, reference.errors
    for t, share in ((400, 0), (450, 1 / 6), (700, 1), (100, 0), (950, 1)):
        at = reference.at(t)
        assert at.levels == (t,)
        np.testing.assert_allclose(at.scores[0], share * high + (1 - share) * low)
        np.testing.assert_allclose(at.errors[0] ** 2, (share * noise) ** 2 + ((1 - share) * less) ** 2)
    spread = np.sqrt((3 * reference.errors**2).mean(1))  # three draws
    np.testing.assert_allclose(reference.draw_errors(), spread)
    single = Reference((5.0,), DIMENSIONS, np.ones((1, 2, 2)), np.full((1, 2, 2), np.nan), ("k", "k"), {})
    np.testing.assert_array_equal(single.at(7).draw_errors(), np.zeros((1, 2)))
