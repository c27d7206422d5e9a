"""The three roads of docs/your-own-model.md: every block of commands runs as printed, on a small pipeline."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.zoo import unets

from prism.cli import main
from prism.judge import Judge
from prism.preference import LatentStore
from prism.training.encode import split_of
from prism.video import write_video

PAGE = (Path(__file__).parents[1] / "docs" / "your-own-model.md").read_text(encoding="utf-8")
ROADS = {title.split(":")[0]: text for title, text in re.findall(r"## (Road .*)\n((?:.|\n)*?)(?=\n## |\Z)", PAGE)}
SMALL = {"train": ["--steps", "2", "--dim", "8", "--mlp-layers", "2"], "eval": ["--timesteps", "699,0"]}


def commands(road: str) -> list[list[str]]:
    """The words of each command in the first block of a road, and what makes it small enough for a test."""
    block = re.search(r"```\n((?:prism .*\n)+)```", ROADS[road])
    assert block is not None
    lines = [shlex.split(line)[1:] for line in block.group(1).splitlines()]
    return [[*words, *SMALL.get(words[0], [])] for words in lines]


def few_prompts() -> list[str]:
    """Prompts of all three splits, as their words decide."""
    chosen: list[str] = []
    for split, count in (("train", 3), ("validation", 2), ("test", 2)):
        texts = (f"a cat on sofa number {number}" for number in range(200))
        chosen += [text for text in texts if split_of(text, (0.1, 0.1)) == split][:count]
    return chosen


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tiny.wan().save_pretrained(folder / "FOLDER_OR_ID")
    (folder / "FOLDER_OR_ID" / "call.json").write_text(json.dumps(tiny.CALL_WAN | {"num_inference_steps": 2}))
    (folder / "prompts.txt").write_text("\n".join(few_prompts()))
    (code,) = re.findall(r"```python\n(.*?)```", ROADS["Road 2"], flags=re.S)
    (folder / "reward.py").write_text(code)
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:The store has .* training prompts:UserWarning")
@pytest.mark.filterwarnings("ignore:.*too few to learn from:UserWarning")
def test_road_1_peoples_pairs(here, capsys):
    (here / "clips").mkdir()
    generator = np.random.default_rng(0)
    with open(here / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "chosen", "rejected"])  # the page's plainest format
        for row, prompt in enumerate(few_prompts()):
            names = [f"clips/{2 * row + side:04d}.mp4" for side in (1, 2)]
            for name in names:
                write_video(here / name, generator.random((9, 32, 32, 3), np.float32), 8)
            table.writerow([prompt, *names])
    for words in commands("Road 1"):
        assert main(words) == 0, words
    store = LatentStore.open("store")
    assert (len(store.videos), len(store.pairs)) == (14, 7)
    assert "14 clips and 7 pairs (3 train, 2 validation, 2 test)" in capsys.readouterr().out
    rows = json.loads((here / "evaluation" / "metrics.json").read_text())["accuracy"]
    assert {(row["t"], row["pairs"]) for row in rows} == {(699, 2), (0, 2)}


@pytest.mark.filterwarnings("ignore:.*too few to learn from:UserWarning")
def test_road_2_a_reward_function(here):
    for words in commands("Road 2"):
        assert main(words) == 0, words
    store = LatentStore.open("store")
    assert len(store.videos) == 4 * len(few_prompts())
    assert store.dimensions == ("steady", "sharp", "overall")
    rows = json.loads((here / "evaluation" / "metrics.json").read_text())["accuracy"]
    assert {row["dimension"] for row in rows} == {"steady", "sharp", "overall"}


@pytest.mark.filterwarnings("ignore:.*too few to learn from:UserWarning")
def test_road_3_ones_own_eyes(here):
    collect, export, back, train = commands("Road 3")
    assert main(collect) == 0
    assert main(export) == 0
    with open("to-label/pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(few_prompts())
    with open("to-label/pairs.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        for number, row in enumerate(rows):
            table.writerow(row | {"VQ": "A", "MQ": "same", "TA": "B", "Overall": ("A", "B", "same")[number % 3]})
    assert main(back) == 0
    assert main(train) == 0
    store = LatentStore.open("store")
    assert store.dimensions == ("VQ", "MQ", "TA", "overall")
    assert set(store.pairs["MQ"].to_pylist()) == {0}
    assert Judge.from_pretrained("head/head", tiny.wan()).dimensions == store.dimensions


@pytest.mark.filterwarnings("ignore:.*too few to learn from:UserWarning")
def test_road_1_with_pictures_of_an_image_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe, call = unets.sd15()
    pipe.save_pretrained("FOLDER_OR_ID")
    call = {**call, "width": 64, "num_inference_steps": 2}
    Path("FOLDER_OR_ID/call.json").write_text(json.dumps(call))
    generator = np.random.default_rng(0)
    with open("pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "chosen", "rejected"])
        for row, prompt in enumerate(few_prompts()):
            names = [f"{row}.png", f"{row}.jpg"]
            for name in names:
                Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(name)
            table.writerow([prompt, *names])
    for words in commands("Road 1"):
        assert main(words) == 0, words
    store = LatentStore.open("store")
    assert len(store.pairs) == 7
    assert store.latents(store.videos["video"].to_pylist()[:1]).shape == (1, 4, 8, 8)
    sample = "sample --backbone FOLDER_OR_ID --head head --prompt cat --n 2 --schedule 2:1 --out best --overwrite"
    for _ in range(2):  # a picture that a run wrote is no stranger's file
        assert main(sample.split()) == 0
    seed = json.loads(Path("best/metrics.json").read_text())["top"][0]["seed"]
    stock = pipe("cat", generator=torch.Generator("cpu").manual_seed(seed), **call).images[0]
    assert np.array_equal(np.asarray(Image.open("best/winner.png")), np.asarray(stock))
    page = Path("best/report.html").read_text()
    assert "<h2>Pictures</h2>" in page
    assert "<video" not in page
