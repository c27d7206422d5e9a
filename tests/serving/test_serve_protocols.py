"""The three protocols answer the requests that the trainers' own clients sent, with the scores of the judge itself."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load
from tests import tiny
from tests.serving.clients import V1, ask, latent_body, recorded, replay, verl_score

from prism.serving.process import Running, bind
from prism.serving.service import Service

SHAPE = (16, 3, 4, 4)


def direct(scorer, latents, t, seed, draws=1, prompts=tiny.PROMPT, **call):
    """Scores of `Judge.score_clean`."""
    generator = torch.Generator().manual_seed(seed)
    return scorer.judge.score_clean(latents, prompts, t, draws, generator, **{**scorer.call, **call})[0]


@pytest.mark.parametrize(("name", "seed"), [("verl-omni.http", 7), ("verl-omni-no-seed.http", 0)])
def test_verl_omni_of_a_picture_with_embeddings(running, scorers, name, seed):
    scorer = scorers["picture"]
    path, headers, body = recorded(name)
    status, answer = ask(f"{running.url}/judges/picture{path}", "POST", body, headers)
    sent = load(body)
    expected = direct(
        scorer,
        sent["latents"].unsqueeze(2),
        1000 * float(sent["u"]),
        seed,
        prompts=None,
        prompt_embeds=sent["prompt_embeds"],
    )
    assert status == 200
    assert answer["protocol_version"] == "1"
    assert answer["raw_scores"] == expected[:, 3].tolist()  # to the bit
    assert answer["scores"]["VQ"] == expected[:, 0].tolist()


def test_videos_have_rank_5_and_rows_of_their_own(running, scorers):
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    levels, seeds = torch.tensor([0.25, 0.5, 0.75]), torch.tensor([3, 4, 5])
    body = latent_body(latents, u=levels, seeds=seeds)
    status, answer = ask(f"{running.url}/v1/score?judge=second", "POST", body, V1)
    assert status == 200
    for row in range(3):
        expected = direct(scorers["second"], latents[[row]], 1000 * float(levels[row]), int(seeds[row]), draws=2)
        assert answer["raw_scores"][row] == pytest.approx(float(expected[0, 0]), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_of_another_precision_are_scored_as_they_are(running, scorers, dtype):
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    _, answer = ask(f"{running.url}/v1/score", "POST", latent_body(latents, 0.5, 9), V1)
    assert answer["raw_scores"] == direct(scorers["prism"], latents, 500, 9)[:, 3].tolist()


def test_unirl_scores_each_video_by_each_judge(running, scorers):
    status, answer = replay(running.url, "unirl-videos.http")
    assert status == 200
    assert answer["errors"] == [{}, {}]
    _, _, body = recorded("unirl-videos.http")
    for request, result in zip(json.loads(body)["requests"], answer["results"], strict=True):
        (turn,) = request["history"]
        assert list(result) == request["required_rewards"]
        for name, scores in result.items():
            scorer = scorers[name]
            direct = scorer.judge.score_video(
                base64.b64decode(turn["video_b64"]), turn["text"], scorer.levels, scorer.draws or 4, **scorer.call
            ).scores.mean(1)[0]
            assert next(iter(scores)) == scorer.dimension  # UniRL takes the first
            assert [scores[each] for each in scorer.judge.dimensions] == pytest.approx(direct.tolist(), abs=1e-5)


def test_unirl_scores_a_picture(running, scorers):
    status, answer = replay(running.url, "unirl-image.http")
    assert status == 200
    turn = json.loads(recorded("unirl-image.http")[2])["requests"][0]["history"][0]
    scorer = scorers["picture"]
    direct = scorer.judge.score_video(base64.b64decode(turn["image_b64"]), turn["text"], (499,), 4, **scorer.call)
    assert answer["results"][0]["picture"]["overall"] == float(direct.scores[0, 0, 3])


def test_unirl_is_told_which_of_several_videos_cannot_be_read(running):
    _, _, body = recorded("unirl-videos.http")
    document = json.loads(body)
    document["requests"][1]["history"][0]["video_b64"] = base64.b64encode(b"no video").decode()
    status, answer = ask(f"{running.url}/score", "POST", json.dumps(document))
    assert status == 200
    assert sorted(answer["results"][0]) == ["prism", "second"]
    assert answer["results"][1] == {}
    assert answer["errors"][0] == {}
    assert "cannot be read" in answer["errors"][1]["prism"] or "no video" in answer["errors"][1]["prism"]


def test_flow_factory_scores_videos(running, scorers):
    status, answer = replay(running.url, "flow-factory-videos.http")
    assert status == 200
    document = json.loads(recorded("flow-factory-videos.http")[2])
    videos = [[base64.b64decode(frame) for frame in video] for video in document["video"]]
    scorer = scorers["prism"]
    direct = scorer.judge.score_video(videos, document["prompt"], (699, 499), 4, **scorer.call).scores.mean(1)
    assert answer["rewards"] == pytest.approx(direct[:, 3].tolist(), abs=1e-5)
    assert answer["scores"]["TA"] == pytest.approx(direct[:, 2].tolist(), abs=1e-5)


def test_flow_factory_scores_a_picture_by_a_judge_of_its_path(running):
    path, headers, body = recorded("flow-factory-image.http")
    status, answer = ask(f"{running.url}/judges/picture{path}", "POST", body, headers)
    assert (status, len(answer["rewards"])) == (200, 1)
    assert ask(f"{running.url}/judges/picture/health")[0] == 200


def test_many_at_once_get_their_own_scores(running, scorers):
    latents = torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(2))
    prompts = [(tiny.PROMPT, tiny.OTHER_PROMPT)[row % 2] for row in range(24)]
    urls = [f"{running.url}/judges/{('prism', 'second')[row // 2 % 2]}/v1/score" for row in range(24)]

    def one(row):
        return verl_score(urls[row], latent_body(latents[[row]], 0.5, row, prompts[row]))

    with ThreadPoolExecutor(12) as pool:
        scores = list(pool.map(one, range(24)))
    for row, score in enumerate(scores):
        scorer = list(scorers.values())[row // 2 % 2]
        expected = direct(scorer, latents[[row]], 500, row, scorer.draws or 1, prompts[row])[0, scorer.column]
        assert score == pytest.approx(float(expected), abs=1e-5)


def test_what_is_served_is_said(running):
    _, facts = ask(f"{running.url}/healthz")
    assert facts["protocol_version"] == "1"
    assert {name: judge["latents"]["ranks"] for name, judge in facts["judges"].items()} == {
        **{"prism": [5], "second": [5], "picture": [4, 5]}
    }
    assert facts["judges"]["prism"]["latents"]["shape"] == list(SHAPE)
    assert facts["judges"]["second"]["reward"] == "VQ"
    assert ask(f"{running.url}/health")[1] == {"status": "ok", "rewards": {name: [True] for name in facts["judges"]}}
    assert ask(f"{running.url}/rewards")[1] == {"rewards": ["prism", "second", "picture"]}


def test_prometheus_reads_counts_and_times(running):
    replay(running.url, "flow-factory-videos.http")
    ask(f"{running.url}/score", "POST", b"[]")
    _, text = ask(f"{running.url}/metrics")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['prism_requests_total{protocol="flow-factory",status="200"}']) >= 1
    assert float(lines['prism_requests_total{protocol="unirl",status="400"}']) >= 1
    assert float(lines['prism_rows_total{judge="prism"}']) >= 2
    assert float(lines['prism_queue_rows{pipeline="pipeline-0"}']) == 0
    assert float(lines["prism_body_bytes"]) == 0
    assert lines.get('prism_batch_rows_count{pipeline="pipeline-1"}') is None  # the three judges share a pipeline


def test_a_token_comes_as_bearer_or_as_the_password_of_the_address(scorers):
    guarded = Running(Service(scorers), bind(port=0), token="a-long-secret")
    guarded.start()
    path, _, body = recorded("flow-factory-videos.http")
    basic = base64.b64encode(b"anyone:a-long-secret").decode()
    for value, status in {
        **{"": 401, "Bearer another": 401, "Basic !!": 401, "Digest a-long-secret": 401},
        **{"Bearer a-long-secret": 200, f"Basic {basic}": 200},
    }.items():
        assert ask(guarded.url + path, "POST", body, {"authorization": value})[0] == status, value
    assert ask(f"{guarded.url}/metrics")[0] == 401
    assert ask(f"{guarded.url}/healthz")[0] == 200
    guarded.stop(60)
