"""Attention on objects, against counting by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prism import runs
from prism.lab import attention
from prism.lab.experiments import looking
from prism.lab.findings import CLAIMED
from prism.shapeworld import grammar, world

pytestmark = pytest.mark.usefixtures("intervals_of_few")

GRID = (5, 4, 4)


def test_the_claim_is_weighed_against_the_untrained_query_too(monkeypatch, tmp_path):
    """Two prompts by hand: shares of (.6, .4) on objects of (.2, .2) of the cells are a lift of 2.5."""
    by_prompt = [
        {"best_attention": 0.6, "best_untrained": 0.2, "worst_attention": 0.5, "worst_untrained": 0.2},
        {"best_attention": 0.4, "best_untrained": 0.2, "worst_attention": 0.3, "worst_untrained": 0.2},
    ]
    rows = [{"t": t, "best_area": 0.2, "worst_area": 0.2, **row} for t in CLAIMED for row in by_prompt]
    monkeypatch.setattr(looking, "_rows", lambda bench: rows)
    bench = SimpleNamespace(parts=runs.claim(tmp_path / "run", {"command": "test"}), seed=0, seeds=range(3))
    finding = looking.run(bench)
    lifts = {row["videos"]: row["lift"] for row in finding.tables["attention"] if row["t"] == CLAIMED[1]}
    assert lifts == pytest.approx(
        {"best": 2.5, "worst": 2.0, looking.UNTRAINED: 1.0, looking.LESS: 0.5, looking.LEARNED: 1.5}
    )
    assert finding.verdict == "holds"
    for row in rows:
        row["best_untrained"] = 0.8  # the untrained query looks there more
    (tmp_path / "run" / "looking.json").unlink()
    assert looking.run(bench).verdict == "does not hold"
    assert len(looking.draw(finding.tables)) == 1


def test_latent_frames_cover_the_clip():
    found = [list(range(17))[span] for span in attention.spans(17, 5)]
    assert found == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
    assert attention.spans(9, 1) == [slice(0, 9)]


@pytest.mark.parametrize("ground", ["dark", "striped"])
def test_object_cells_are_those_the_object_is_in(ground):
    """A 16-pixel square that lies in one cell of every frame but the last four, where it is in another."""
    prompt = "a red square stays still" + ("" if ground == "dark" else f" on a {ground} ground")
    video = world.ground_image(ground).expand(17, -1, -1, -1).clone()
    video[:13, 16:32, 32:48] = torch.tensor(grammar.COLOURS["red"])
    video[13:, 48:64, 0:16] = torch.tensor(grammar.COLOURS["red"])
    cells = attention.object_cells(video[None], prompt, GRID)[0]
    expected = torch.zeros(GRID, dtype=torch.bool)
    expected[:4, 1, 2] = True
    expected[4, 3, 0] = True
    assert torch.equal(cells, expected)


def test_a_rendered_object_is_found_where_it_is_drawn():
    scenes = [scene for prompt in grammar.prompts("test", 8) if (scene := grammar.parse(prompt))]
    videos = world.render(scenes, 0)
    for scene, video in zip(scenes, videos):
        cells = attention.object_cells(video[None], scene.prompt, GRID)[0]
        assert 0.02 < cells.float().mean() < 0.6
        bare = world.ground_image(scene.ground).expand(17, -1, -1, -1)
        assert not attention.object_cells(bare[None], scene.prompt, GRID).any()


def test_prompts_outside_the_grammar_have_no_known_ground():
    with pytest.raises(ValueError, match="grammar"):
        attention.object_cells(torch.zeros(1, 17, 64, 64, 3), "a cat runs", GRID)


def test_shares_by_hand():
    weights = torch.zeros(2, *GRID)
    weights[0, 0, 0, 0], weights[0, 4, 3, 3] = 0.3, 0.1
    weights[1] = 1 / 80
    cells = torch.zeros(2, *GRID, dtype=torch.bool)
    cells[:, 0, 0, 0] = cells[:, 1, 0, 0] = True
    first, second = attention.shares(weights, cells)
    assert first == pytest.approx({"attention": 0.75, "area": 2 / 80, "video": 0.4})
    assert second == pytest.approx({"attention": 2 / 80, "area": 2 / 80, "video": 1.0})


def test_rows_compare_best_and_worst_candidates():
    def share(on_objects, area):
        return {"attention": on_objects, "area": area, "video": 0.5}

    found = [
        {"prompt": "a", "values": [0.2, 0.9], "looks": {"899": [share(0.1, 0.1), share(0.4, 0.2)]}},
        {"prompt": "b", "values": [0.8, 0.4], "looks": {"899": [share(0.2, 0.1), share(0.1, 0.2)]}},
    ]
    best, worst = attention.rows(found, seed=0)
    assert (best["candidates"], best["t"], best["prompts"]) == ("best", 899.0, 2)
    assert best["lift"] == pytest.approx((0.4 + 0.2) / (0.2 + 0.1))
    assert best["referee"] == pytest.approx(0.85)
    assert best["lift_ci95"] == pytest.approx([2.0, 2.0])
    assert worst["lift"] == pytest.approx((0.1 + 0.1) / (0.1 + 0.2))
    assert worst["lift_ci95"] == pytest.approx([0.5, 1.0])
    assert attention.rows([], seed=0) == []


def test_light_falls_where_the_weight_is():
    video = np.full((17, 64, 64, 3), 0.2, dtype=np.float32)
    weights = np.zeros(GRID)
    weights[2, 1, 3] = 0.5
    lit = attention.overlaid(video, weights)
    assert lit.shape == video.shape
    assert lit.min() >= 0
    red = lit[..., 0]
    place = np.unravel_index(red[6].argmax(), (64, 64))
    assert abs(place[0] - 24) <= 2
    assert place[1] >= 54
    assert np.allclose(red[:5], red[0, 0, 0])  # no light in the frames of other cells
    assert red[5:9, 24, 60].min() > red[0, 24, 60] + 0.1
    faint = attention.overlaid(video, weights, top=5.0)
    assert faint[6, 24, 60, 0] < lit[6, 24, 60, 0]
