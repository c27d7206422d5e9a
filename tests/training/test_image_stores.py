"""Stores of image-to-video models: each video keeps the image it starts from, and is judged with that image alone."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.zoo.wan_to_kandinsky import cogvideox_i2v, wan21_i2v

from prism import files
from prism.backbone import Backbone
from prism.clips import FramePolicy
from prism.errors import PrismError
from prism.evaluation import measure, score_videos
from prism.evaluation.evaluator import noised
from prism.judge import Judge
from prism.judge import reference as references
from prism.judge.scoring import score_latents
from prism.preference import LatentStore, StoreWriter, images, unit_name
from prism.preference.prompts import Prompt, read_prompts
from prism.preference.readers import read
from prism.preference.sources import Place
from prism.sampling.trajectory import candidate_seed
from prism.training import TrainConfig, annotation, train
from prism.training.batches import Batches
from prism.training.collect import collect
from prism.training.conditionings import Conditionings
from prism.training.encode import encode
from prism.training.reward import Reward
from prism.video import write_video

TEXTS = ("a red circle moves right", "a blue square moves up", "a cat runs", "a green triangle moves left")
SPLITS = ("train", "train", "validation", "test")


def picture(path: Path, seed: int) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(path)
    return path


@functools.cache
def wan() -> tuple[Backbone, dict]:
    pipe, call = wan21_i2v()
    return Backbone(pipe), {name: value for name, value in call.items() if name != "image"}


def light(video, prompt):
    return {"VQ": float(video.mean())}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list[Prompt]:
    """Five prompts of four texts: the first text has two images, and the last two texts share one."""
    folder = tmp_path_factory.mktemp("prompts")
    for name, seed in (("a.png", 0), ("b.jpg", 1), ("c.webp", 2), ("d.png", 3)):
        picture(folder / name, seed)
    rows = zip((TEXTS[0], *TEXTS), ("train", *SPLITS), ("a.png", "b.jpg", "c.webp", "d.png", "d.png"))
    (folder / "p.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text, "split": split, "image": image}) for text, split, image in rows)
    )
    return read_prompts(folder / "p.jsonl")


@pytest.fixture(scope="module")
def store(prompts, tmp_path_factory) -> LatentStore:
    backbone, call = wan()
    out = tmp_path_factory.mktemp("collected") / "store"
    return collect(prompts, backbone, call, out, [Reward(light, "light")], candidates=2, seed=5, progress=False)


def rows_of(store: LatentStore) -> list[dict]:
    return store.videos.to_pylist()


def test_prompts_name_images_beside_their_file(prompts):
    assert [Path(prompt.image).name for prompt in prompts] == ["a.png", "b.jpg", "c.webp", "d.png", "d.png"]
    assert len({prompt.text for prompt in prompts}) == 4


def test_candidates_are_stock_calls_from_their_images(store, prompts):
    backbone, call = wan()
    assert len(store.videos) == 10
    for place in (0, 3, 9):
        row, prompt = rows_of(store)[place], prompts[place // 2]
        image = Image.open(prompt.image).convert("RGB")
        text = f"{prompt.text}\0{files.sha256(prompt.image)}"
        assert row["seed"] == candidate_seed(5, text, place % 2)
        latents = backbone.pipe(
            prompt=prompt.text, image=image, generator=torch.Generator("cpu").manual_seed(row["seed"]), **call,
            output_type="latent",
        ).frames  # fmt: skip
        assert torch.equal(store.latents([row["video"]]), latents)
    assert store.call == call


def test_each_image_is_kept_once_with_its_own_bytes(store, prompts):
    kept = sorted(path.name for path in (store.folder / "images").iterdir())
    assert kept == sorted(
        {f"{files.sha256(prompt.image)}{Path(prompt.image).suffix}" for prompt in prompts}  # png, jpg, webp
    )
    for row, prompt in zip(rows_of(store), [each for each in prompts for _ in range(2)]):
        path = store.image_of(row["video"])
        assert path.read_bytes() == Path(prompt.image).read_bytes()
        assert store.call_of(row["video"])["image"] == str(path)


def test_pairs_are_of_one_image(store):
    image_of = {row["video"]: row["image"] for row in rows_of(store)}
    pairs = store.pairs.to_pylist()
    assert len(pairs) == 5
    assert all(image_of[pair["video_a"]] == image_of[pair["video_b"]] for pair in pairs)
    chosen = annotation.drawn_pairs(store, None, None, 0)
    assert {frozenset(pair[1:]) for pair in chosen} == {frozenset((p["video_a"], p["video_b"])) for p in pairs}


def judge_of(backbone) -> Judge:
    torch.manual_seed(0)
    return Judge.untrained(backbone, tap=2, dim=32, dimensions=("VQ",))


def by_hand(judge, store, row, image, t) -> np.ndarray:
    noisy = noised(judge.backbone, store.latents([row["video"]]), [row["video"]], t)
    return judge.score(noisy, [row["prompt"]], t, **store.call, image=Image.open(image)).double().cpu().numpy()[0]


def test_scores_are_those_with_the_videos_own_image_and_with_no_other(store, prompts):
    judge = judge_of(wan()[0])
    groups = store.groups("train", ("VQ",))
    assert len(groups) == 2  # of the first one the videos have two images
    scores = score_videos(judge, store, groups, 600.0)
    rows = {row["video"]: (row, prompts[place // 2]) for place, row in enumerate(rows_of(store))}
    for video, score in scores.items():
        row, prompt = rows[video]
        np.testing.assert_allclose(score, by_hand(judge, store, row, prompt.image, 600.0), atol=1e-5)
        others = {each.image for each in prompts} - {prompt.image}
        assert all(abs(score - by_hand(judge, store, row, other, 600.0)).max() > 1e-3 for other in others)


def test_training_reads_each_video_with_its_own_image(store, prompts):
    backbone, _ = wan()
    config = TrainConfig(steps=1, prompts_per_step=2, validate_every=0)
    groups = store.groups("train", ("VQ",))
    batch, conditionings = (
        Batches(store, groups, backbone, config).draw(0, range(2)),
        Conditionings(backbone, store, groups),
    )
    image_of = {row["video"]: prompts[place // 2].image for place, row in enumerate(rows_of(store))}
    videos = [video for start in _starts(batch) for video in groups[batch.prompts[start]].videos]
    seen = set()
    for part in batch.passes(64):
        assert len({image_of[videos[row]] for row in part}) == 1
        read = conditionings.of([batch.prompts[row] for row in part], batch.kinds[part[0]])
        stacked, t = torch.stack([batch.latents[row] for row in part]), batch.t[part]
        tokens = backbone.tokens(stacked, read, t, 2).visual
        for place, row in enumerate(part):
            image, prompt = Image.open(image_of[videos[row]]), groups[batch.prompts[row]].prompt
            alone = backbone.condition([prompt], image=image, **store.call)
            expected = backbone.tokens(stacked[place : place + 1], alone, t[place], 2).visual
            torch.testing.assert_close(tokens[place : place + 1], expected, atol=1e-4, rtol=1e-4)
            seen.add(image_of[videos[row]])
    assert len(seen) == 3


def _starts(batch) -> list[int]:
    return np.cumsum([0, *(count for count, _ in batch.groups)])[:-1].tolist()


def test_train_eval_and_reference(store, prompts, tmp_path):
    judge = judge_of(wan()[0])
    config = TrainConfig(steps=2, prompts_per_step=2, validate_every=2, learning_rate=1e-3)
    assert train(store, judge, config, tmp_path / "run", progress=False)["history"]
    rows = measure(judge, store, "test", [600.0], progress=False).rows
    assert rows[0]["pairs"] == 1
    made = references.measure(judge, store, "test", [600.0], num_draws=2, progress=False)
    place = next(place for place, row in enumerate(rows_of(store)) if row["split"] == "test")
    row, image = rows_of(store)[place], Image.open(prompts[place // 2].image)
    latents, text = store.latents([row["video"]]), [row["prompt"]]
    expected, _ = score_latents(judge, latents, [row["video"]], text, [600.0], 2, **store.call, image=image)
    np.testing.assert_allclose(made.scores[0, 0], expected[0, 0].numpy(), rtol=1e-4, atol=1e-5)


def copied(store: LatentStore, folder: Path) -> LatentStore:
    shutil.copytree(store.folder, folder)
    return LatentStore.open(folder)


def test_a_flipped_byte_a_missing_image_and_a_foreign_name_are_told(store, tmp_path):
    video = store.videos["video"][0].as_py()
    flipped = copied(store, tmp_path / "flipped")
    path = store.folder / "images" / rows_of(store)[0]["image"]
    path = tmp_path / "flipped" / "images" / path.name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(PrismError, match="is not the one that was written: its name has another SHA-256"):
        flipped.call_of(video)
    path.unlink()
    with pytest.raises(PrismError, match=r"is missing\. Copy the store again"):
        flipped.call_of(video)
    for name in ("../store.json", "/etc/passwd", "a.png", f"{'0' * 64}.png/x"):
        with pytest.raises(PrismError, match="is no SHA-256 with an ending"):
            images.path_of(store.folder, name)


def test_the_writer_refuses_an_image_that_it_does_not_keep(tmp_path):
    writer = StoreWriter(tmp_path / "store", {"a": 1}, {"call": {}, "command": "", "seed": 0})
    rows = {"video": ["v"], "prompt": ["p"], "split": ["train"], "image": [f"{'0' * 64}.png"]}
    with pytest.raises(PrismError, match="is not in the store; call keep_image first"):
        writer.write(unit_name(0, ["v"]), pa.table(rows), {"latents": torch.zeros(1, 2, 3)})
    (tmp_path / "n.png").write_bytes(b"\x80\x04nothing")
    picture(tmp_path / "cut.png", 0)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    for name, message in (("n.png", "no whole picture"), ("cut.png", "no whole picture"), ("gone.png", "gone.png")):
        with pytest.raises(PrismError, match=message):
            writer.keep_image(tmp_path / name)
    assert not (tmp_path / "store" / "images").exists()
    kept = writer.keep_image(picture(tmp_path / "x.png", 4))
    (tmp_path / "store" / "images" / kept).write_bytes(b"half")  # as of a disk that lost it: written again
    again = StoreWriter(tmp_path / "store", {"a": 1}, {"call": {}, "command": "", "seed": 0}, resume=True)
    assert again.keep_image(tmp_path / "x.png") == kept
    assert images.is_whole(tmp_path / "store" / "images" / kept)


def test_images_of_prompts_are_checked_before_anything_is_sampled(prompts, tmp_path):
    backbone, call = wan()
    (tmp_path / "p.csv").write_text("prompt,image\na cat,gone.png\n")
    with pytest.raises(PrismError, match=r"The image gone.png in row 0 of p.csv .*is no file; give a path relative to"):
        read_prompts(tmp_path / "p.csv")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = [*prompts, Prompt("a dog", Place("p.csv", 7), "train", str(tmp_path / "bad.png"))]
    with pytest.raises(PrismError, match=r"image of row 7 of p.csv.* cannot be sampled with: .*bad.png"):
        collect(bad, backbone, call, tmp_path / "store", progress=False)
    with pytest.raises(PrismError, match=r'The prompt "a dog" has no image, and WanImageToVideoPipeline needs one'):
        collect([*prompts, "a dog"], backbone, call, tmp_path / "store", progress=False)
    with pytest.raises(PrismError, match=r"WanPipeline takes no image, and row 0 of p.jsonl.* names one"):
        collect(prompts, Backbone(tiny.wan()), tiny.CALL_WAN, tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()


def test_a_set_is_encoded_with_its_images(tmp_path, capsys):
    backbone, call = wan()
    picture(tmp_path / "one.png", 5)
    picture(tmp_path / "two.png", 6)
    (tmp_path / "three.png").write_bytes(b"broken")
    lines = ["prompt,chosen,rejected,image"]
    for place, (text, image) in enumerate(zip(TEXTS, ("one.png", "two.png", "one.png", "three.png"))):
        for side in "ab":
            frames = np.random.default_rng(place).uniform(size=(9, 32, 48, 3)) * (0.5 if side == "b" else 1)
            write_video(tmp_path / f"{place}{side}.mp4", frames, 8)
        lines.append(f"{text},{place}a.mp4,{place}b.mp4,{image}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    policy = FramePolicy(num_frames=9, height=32, width=48)
    store = encode(read(tmp_path / "pairs.csv"), backbone, call, policy, tmp_path / "store", progress=False)
    assert "2 clips could not be read" in capsys.readouterr().err
    assert len(store.videos) == 6
    assert len(store.pairs) == 3
    assert len(list((tmp_path / "store" / "images").iterdir())) == 2
    digests = {row["video"]: row["image"][:64] for row in rows_of(store)}
    assert digests["0a.mp4"] == digests["2b.mp4"] == files.sha256(tmp_path / "one.png")
    assert digests["1a.mp4"] == files.sha256(tmp_path / "two.png")
    (tmp_path / "pairs.csv").write_text("\n".join([*lines[:2], f"{TEXTS[1]},1a.mp4,1b.mp4,"]))
    with pytest.raises(PrismError, match=r"The clip 1a.mp4 has no image, and WanImageToVideoPipeline needs one"):
        encode(read(tmp_path / "pairs.csv"), backbone, call, policy, tmp_path / "other", progress=False)
    plain = encode(
        read(tmp_path / "pairs.csv"), Backbone(tiny.wan()), {**tiny.CALL_WAN, "width": 48}, policy,
        tmp_path / "plain", progress=False,
    )  # fmt: skip
    assert set(plain.videos["image"].to_pylist()) == {None}
    assert "image" not in plain.call_of("0a.mp4")


def test_a_clip_of_two_images_is_refused(tmp_path):
    (tmp_path / "r.csv").write_text("prompt,video,VQ,annotator,image\na,x.mp4,1,u,p.png\na,x.mp4,2,v,q.png\n")
    with pytest.raises(PrismError, match=r"The clip x.mp4 has the image q.png in row 1 .* and p.png before"):
        read(tmp_path / "r.csv")
    (tmp_path / "r.csv").write_text("prompt,video,VQ,image\na,x.mp4,1,../../p.png\n")
    with pytest.raises(PrismError, match="leads out of the data's folder"):
        read(tmp_path / "r.csv")


def test_cogvideox_is_collected_and_scored_with_its_images(prompts, tmp_path):
    pipe, call = cogvideox_i2v()
    call.pop("image")
    backbone = Backbone(pipe)
    store = collect(prompts[:2], backbone, call, tmp_path / "store", candidates=1, progress=False)
    judge, latents = judge_of(backbone), store.latents(store.videos["video"].to_pylist())
    videos = store.videos["video"].to_pylist()
    assert store.kinds(videos).tolist() == [0, 1]
    scores = [judge.score(latents[:1], [TEXTS[0]], 500.0, **store.call_of(video)).item() for video in videos]
    assert abs(scores[0] - scores[1]) > 1e-4
