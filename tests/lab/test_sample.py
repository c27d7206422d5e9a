"""What is said of a sampled video by ShapeWorld's referee, and of those that it cannot measure."""

from __future__ import annotations

import numpy as np
import pytest
from tests import tiny

from prism import cli, files, shapeworld
from prism.commands.sampled import refereed
from prism.shapeworld import CALL, grammar, referee, world


def test_a_prompt_of_the_grammar_is_refereed():
    prompt = grammar.prompts("test", 1)[0]
    scene = grammar.parse(prompt)
    assert scene is not None
    video = world.render([scene], 0)[0]
    scores, sentence = refereed(video.numpy(), prompt)
    assert scores == referee.score(video, prompt)
    assert scores["overall"] > 0.8
    assert f"overall {scores['overall']:.2f}" in sentence


@pytest.mark.parametrize(
    ("prompt", "shape", "said"),
    [("a cat runs", (17, 64, 64, 3), "outside the grammar"), ("a red circle grows", (9, 64, 64, 3), "9 × 64 × 64")],
)
def test_what_cannot_be_measured_is_told_in_a_sentence(prompt, shape, said):
    scores, sentence = refereed(np.zeros(shape, dtype=np.float32), prompt)
    assert scores is None
    assert said in sentence
    assert sentence.count(".") == 1 + sentence.count("docs/shapeworld.md")


def test_a_prompt_outside_the_grammar_is_sampled_all_the_same(tmp_path, monkeypatch, capsys):
    pipe = tiny.shapeworld()
    monkeypatch.setattr(shapeworld, "pipeline", lambda: pipe)
    monkeypatch.setitem(CALL, "num_inference_steps", 2)
    out = tmp_path / "out"
    command = ["sample", "--prompt", "a cat runs home", "--strategy", "none", "--n", "3", "--out", str(out)]
    assert cli.main([*command, "--top-k", "2"]) == 0
    metrics = files.read_json(out / "metrics.json")
    assert [(pick["seed"], pick["video"]) for pick in metrics["top"]] == [(0, "winner.mp4"), (1, "winner-2.mp4")]
    assert (out / "winner-2.mp4").is_file()
    assert metrics["referee"] is None
    assert "“a cat runs home” is outside the grammar" in capsys.readouterr().out
    assert "outside the grammar" in (out / "report.html").read_text()
    assert (out / "winner.mp4").is_file()
