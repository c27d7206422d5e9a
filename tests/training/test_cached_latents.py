"""Latents that FastVideo or musubi-tuner cached become the store that encoding the same clips makes.

The caches are written here as those programs write them, with the VAE called directly.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests import tiny
from tests.zoo import VARIANTS

from prism import cli
from prism.backbone import Backbone
from prism.clips import FramePolicy, read_clip
from prism.errors import PrismError
from prism.preference.cache_files import _NAME
from prism.preference.caches import LatentCache
from prism.preference.readers import read
from prism.training.cached import CachedLatents
from prism.training.encode import encode
from prism.video import write_video

POLICY = FramePolicy(num_frames=9, height=32, width=32, start="first")
CALL = tiny.CALL_WAN
NAMES = ["day_one", "b.take-2", "00000-009_x", "d", "e_0832x0480_wan", "été"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny.wan())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cached-set")
    rng = np.random.default_rng(0)
    for name in NAMES:
        write_video(folder / f"{name}.mp4", rng.uniform(size=(9, 32, 32, 3)), 8)
    rows = [
        {"prompt": f"prompt {place}", "chosen": f"{NAMES[2 * place]}.mp4", "rejected": f"{NAMES[2 * place + 1]}.mp4"}
        for place in range(3)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pairs.jsonl"


def mean_of(pipe, path) -> torch.Tensor:
    """(C, F, H, W): the posterior's mean, which FastVideo keeps."""
    frames = torch.from_numpy(read_clip(str(path), POLICY).frames).float() / 255
    with torch.no_grad():
        return pipe.vae.encode(frames.permute(3, 0, 1, 2)[None] * 2 - 1).latent_dist.mode()[0]


def wan_scale(pipe, latent: torch.Tensor) -> torch.Tensor:
    """As the encoder in musubi-tuner's Wan VAE returns it."""
    config = pipe.vae.config
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (latent - mean) / std


def numbers(name: str, tensor: torch.Tensor) -> dict:
    array = tensor.contiguous().numpy()
    return {f"{name}_bytes": array.tobytes(), f"{name}_shape": list(array.shape), f"{name}_dtype": str(array.dtype)}


def fastvideo_row(name: str, latent: torch.Tensor | None, **others) -> dict:
    text = numbers("text_embedding", torch.zeros(3, 4))
    facts = {"media_type": "video", "width": 32, "height": 32, "num_frames": 3, "duration_sec": 1.0, "fps": 8.0}
    row = {"id": name, "file_name": name, "caption": "text", **text, **facts}
    return {**row, **(numbers("vae_latent", latent) if latent is not None else {}), **others}


def write_fastvideo(folder: Path, rows: list[dict], per_file: int = 4) -> Path:
    place = folder / "combined_parquet_dataset" / "worker_0"
    place.mkdir(parents=True)
    for start in range(0, len(rows), per_file):
        pq.write_table(pa.Table.from_pylist(rows[start : start + per_file]), place / f"data_chunk_{start}.parquet")
    (place / "file_info.pkl").write_bytes(pickle.dumps([1]))  # FastVideo leaves one beside the tables
    return folder


def musubi(folder: Path, stem: str, latent: torch.Tensor, architecture: str = "wan", extra: str = "00000-009") -> Path:
    folder.mkdir(exist_ok=True)
    short = {"hunyuan_video": "hv", "hunyuan_video_1_5": "hv15", "kandinsky5": "k5"}.get(architecture, architecture)
    dtype, size = str(latent.dtype).split(".")[-1], "x".join(map(str, latent.shape[1:]))
    tensors = {f"latents_{size}_{dtype}": latent, f"latents_image_{size}_{dtype}": torch.ones_like(latent)}
    tensors[f"clip_{dtype}"] = torch.ones(2, 3, dtype=latent.dtype)
    metadata = {"architecture": architecture, "width": "832", "height": "480", "format_version": "1.0.1"}
    path = folder / f"{stem}_{extra}_0832x0480_{short}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    save_file({f"varlen_t5_{dtype}": torch.ones(2, 3)}, folder / f"{stem}_{short}_te.safetensors", metadata=metadata)
    return path


def made(data, backbone, out, cache=None, **options):
    latents = LatentCache.open(cache) if cache is not None else None
    options = {"held_out": (0.2, 0.2), "unit": 4, "progress": False, "latents": latents, **options}
    return encode(read(data), backbone, CALL, POLICY, out, **options)


@pytest.fixture(scope="module")
def encoded(data, backbone, tmp_path_factory):
    return made(data, backbone, tmp_path_factory.mktemp("encoded") / "store")


@pytest.mark.parametrize("form", ["fastvideo", "musubi", "musubi-bf16"])
def test_a_cache_makes_the_store_of_the_clips(form, data, backbone, encoded, tmp_path):
    means = {name: mean_of(backbone.pipe, data.parent / f"{name}.mp4") for name in NAMES}
    if form == "fastvideo":  # names up to the first dot; rows in an order of their own
        rows = [fastvideo_row(name.split(".")[0], mean) for name, mean in reversed(means.items())]
        cache = write_fastvideo(tmp_path / "cache", rows)
    else:
        cache = tmp_path / "cache"
        kind = torch.bfloat16 if form.endswith("bf16") else torch.float32
        for name, mean in means.items():
            musubi(cache, name, wan_scale(backbone.pipe, mean).to(kind))
    store = made(data, backbone, tmp_path / "store", cache)
    ids = [f"{name}.mp4" for name in NAMES]
    found, expected = store.latents(ids), encoded.latents(ids)
    assert torch.allclose(found, expected, rtol=2**-7 if form.endswith("bf16") else 2**-10, atol=1e-5)
    assert store.pairs.equals(encoded.pairs)
    assert sorted(store.videos["video"].to_pylist()) == sorted(ids)
    assert store.meta["key"]["latents"]["cache"] == {"fastvideo": "fastvideo"}.get(form, "musubi-tuner")
    with pytest.raises(PrismError, match="differs in key: latents"):
        write_fastvideo(tmp_path / "other", [fastvideo_row(name, mean + 0.5) for name, mean in means.items()])
        made(data, backbone, tmp_path / "store", tmp_path / "other", resume=True)


@pytest.mark.parametrize(
    ("variant", "architecture"),
    [("hunyuan", "hunyuan_video"), ("hunyuan15", "hunyuan_video_1_5"), ("kandinsky5_t2v", "kandinsky5")],
)
def test_each_architecture_has_the_scale_and_layout_of_its_loop(variant, architecture, tmp_path):
    pipe, call = VARIANTS[variant]()
    backbone = Backbone(pipe)
    frames = np.random.default_rng(1).integers(0, 256, (call["num_frames"], call["height"], call["width"], 3), np.uint8)
    expected = backbone.encode(frames[None]).half()
    pixels = torch.from_numpy(frames).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(pixels).latent_dist.mode()[0]
    scaled = mean * pipe.vae.config.scaling_factor if architecture == "kandinsky5" else mean
    musubi(tmp_path / "cache", "a", scaled, architecture)
    clip = {"video": "a.mp4", "path": "a.mp4"}
    reader = CachedLatents(LatentCache.open(tmp_path / "cache"), backbone, tuple(expected.shape[1:]))
    assert reader.find([clip]) == ([clip], [])
    assert torch.allclose(reader(clip)[0]["latents"].float(), expected.float(), rtol=2**-9, atol=1e-4)
    if variant != "hunyuan15":
        write_fastvideo(tmp_path / "fast", [fastvideo_row("a", mean)])
        reader = CachedLatents(LatentCache.open(tmp_path / "fast"), backbone, tuple(expected.shape[1:]))
        reader.find([clip])
        assert torch.allclose(reader(clip)[0]["latents"].float(), expected.float(), rtol=2**-9, atol=1e-4)
    else:
        write_fastvideo(tmp_path / "fast", [fastvideo_row("a", mean)])
        with pytest.raises(PrismError, match="does not say how its latents are scaled"):
            CachedLatents(LatentCache.open(tmp_path / "fast"), backbone, (1,))


def test_fastvideos_trajectories_become_states_at_the_levels_at_which_the_denoiser_took_them(data, backbone, tmp_path):
    rows, taken = [], {}
    for number, name in enumerate(NAMES):
        after, inputs = [], []

        def keep(pipe, step, timestep, tensors, after=after):
            after.append((float(timestep), tensors["latents"][0].clone()))
            return {}

        hook = backbone.pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs, inputs=inputs: inputs.append(
                (float(kwargs["timestep"][0]), kwargs["hidden_states"][0])
            ),
            with_kwargs=True,
        )
        generator = torch.Generator().manual_seed(number)
        backbone.pipe(tiny.PROMPT, **CALL, generator=generator, output_type="latent", callback_on_step_end=keep)
        hook.remove()
        taken[f"{name}.mp4"] = dict(inputs)
        steps = numbers("trajectory_latents", torch.stack([latents for _, latents in after])[None])
        times = numbers("trajectory_timesteps", torch.tensor([t for t, _ in after]))
        rows.append(fastvideo_row(name.split(".")[0], None, **steps, **times))
    store = made(data, backbone, tmp_path / "store", write_fastvideo(tmp_path / "cache", rows))
    states, t = store.trajectory(list(taken))
    assert t.shape == (6, 5)
    for row, levels in enumerate(taken.values()):
        for place, level in enumerate(t[row].tolist()):
            assert torch.equal(states[row, place], levels[level].half().float())


def test_what_is_damaged_is_told_and_left_out_with_its_pairs(data, backbone, tmp_path, capsys):
    latent = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    cache = tmp_path / "cache"
    for name in NAMES[:4]:
        musubi(cache, name, latent)
    zero = latent.clone()
    zero[:, 1] = 0
    musubi(cache, NAMES[4], zero)
    store = made(data, backbone, tmp_path / "store", cache)
    assert "2 clips could not be read" in (told := capsys.readouterr().err)
    assert "is not in the cache" in told
    assert sorted(store.pairs["prompt"].to_pylist()) == ["prompt 0", "prompt 1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vae_latent_shape": [16, 3, 4, 5]}, "do not fit each other"),
        ({"vae_latent_shape": [-16, -3, 4, 4]}, "do not fit each other"),
        ({"vae_latent_shape": None}, "do not fit each other"),
        ({"vae_latent_shape": [48, 4, 4]}, "must have 4 axes"),
        ({"vae_latent_shape": [3, 16, 4, 4]}, "the pipeline makes"),
        ({"vae_latent_dtype": "object"}, "must be one of"),
        ({"vae_latent_bytes": b""}, "no latent"),
        (numbers("vae_latent", torch.full((16, 3, 4, 4), torch.nan)), "NaN"),
        (numbers("vae_latent", torch.full((16, 3, 4, 4), 1e6)), "beyond float16"),
        (numbers("vae_latent", torch.zeros(16, 3, 4, 4)), "zero in all of a frame"),
        (
            numbers("trajectory_latents", torch.ones(2, 16, 3, 4, 4)) | {"vae_latent_bytes": None},
            "2 states and none timesteps",
        ),
        (
            numbers("trajectory_latents", torch.ones(2, 16, 3, 4, 4))
            | numbers("trajectory_timesteps", torch.tensor([400.0, 900.0]))
            | {"vae_latent_bytes": None},
            "must fall, from at most 1000",
        ),
        (
            numbers("trajectory_latents", torch.ones(2, 16, 3, 4, 4))
            | numbers("trajectory_timesteps", torch.tensor([900, 400])),
            "a latent and a trajectory",
        ),
    ],
)
def test_rows_of_fastvideo_that_contradict_themselves_are_refused(change, words, backbone, tmp_path):
    cache = write_fastvideo(tmp_path / "cache", [fastvideo_row("a", torch.ones(16, 3, 4, 4), **change)])
    reader = CachedLatents(LatentCache.open(cache), backbone, (16, 3, 4, 4))
    clip = {"video": "a.mp4", "path": "folder/a.mp4"}
    reader.find([clip])
    with pytest.raises(PrismError, match=words):
        reader(clip)


def test_names_that_do_not_tell_two_clips_apart_are_refused_and_parts_are_told_by_shape(backbone, tmp_path):
    latent = torch.ones(16, 3, 4, 4)
    for start, frames in (("00000-009", 3), ("00000-001", 1)):
        musubi(tmp_path / "cache", "a", latent[:, :frames], extra=start)
    reader = CachedLatents(LatentCache.open(tmp_path / "cache"), backbone, (16, 3, 4, 4))
    clips = [{"video": name, "path": name} for name in ("one/a.mp4", "two/a.mp4")]
    with pytest.raises(PrismError, match=r"one/a\.mp4 and two/a\.mp4 have one name"):
        reader.find(clips)
    reader.find(clips[:1])
    assert reader(clips[0])[0]["latents"].shape == (1, 16, 3, 4, 4)
    musubi(tmp_path / "cache", "a", latent, extra="00004-009")
    reader = CachedLatents(LatentCache.open(tmp_path / "cache"), backbone, (16, 3, 4, 4))
    with pytest.raises(PrismError, match="3 latents in the cache, 2 of them"):
        reader.find(clips[:1])
    with pytest.raises(PrismError, match=r"none of the 1 clips; it names a, the set sha256"):
        reader.find([{"video": "sha256:0", "path": "x.parquet#video/a"}])


def test_folders_that_are_no_cache_are_refused(backbone, tmp_path):
    latent = torch.ones(16, 3, 4, 4)
    cases = {name: tmp_path / name for name in ("pickles", "framepack", "image", "none", "both", "torn", "table")}
    for folder in cases.values():
        folder.mkdir()
    torch.save({"latents": latent}, cases["pickles"] / "a.pt")
    musubi(cases["framepack"], "a", latent, "framepack", "00000-009-00")
    musubi(cases["image"], "a", latent, "qwen_image")
    (cases["none"] / "a.mp4").write_bytes(b"")
    musubi(cases["both"], "a", latent)
    write_fastvideo(cases["both"], [fastvideo_row("a", latent)])
    path = musubi(cases["torn"], "a", latent)
    path.write_bytes(path.read_bytes()[:-9])
    (cases["table"] / "a.parquet").write_bytes(b"PAR1")
    words = {
        "pickles": "a.pt, which may be a pickle",
        "framepack": "sections of a clip",
        "image": "latents of qwen_image",
        "none": r"files of \.mp4",
        "both": "latents of two forms",
        "torn": "not a whole safetensors file",
        "table": "not a whole Parquet file",
    }
    for name, folder in cases.items():
        with pytest.raises(PrismError, match=words[name]):
            LatentCache.open(folder)
    with pytest.raises(PrismError, match="is no folder"):
        LatentCache.open(tmp_path / "absent")
    musubi(tmp_path / "hv", "a", latent, "hunyuan_video")
    with pytest.raises(PrismError, match="the pipeline has AutoencoderKLWan"):
        CachedLatents(LatentCache.open(tmp_path / "hv"), backbone, (16, 3, 4, 4))
    musubi(tmp_path / "mixed", "a", latent)
    musubi(tmp_path / "mixed", "b", latent, "hunyuan_video")
    cache = LatentCache.open(tmp_path / "mixed")
    with pytest.raises(PrismError, match="states the architecture hunyuan_video"):
        cache.read(cache.find("b.mp4")[0], True)


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=30), st.integers(0, 99999), st.integers(1, 9999))
def test_the_name_of_a_clip_is_what_stands_before_the_last_of_its_facts(stem, start, count):
    match = _NAME.fullmatch(f"{stem}_{start:05d}-{count:03d}_0832x0480_wan")
    assert match
    assert (match["stem"], match["count"]) == (stem, f"{count:03d}")


CELLS = {
    "bytes": st.one_of(st.none(), st.binary(max_size=8), st.just(bytes(3072)), st.just(b"\x00\x3c" * 1536)),
    "shape": st.one_of(st.none(), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6), st.just([16, 3, 4, 4])),
    "dtype": st.one_of(
        st.none(), st.text(max_size=5), st.sampled_from(["float16", "bfloat16", "torch.float32", "int64"])
    ),
}
TEXTS = {name: st.one_of(st.none(), st.text(max_size=5)) for name in CELLS}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cells_give_latents_or_a_sentence(backbone, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cells")
    kinds = {"bytes": pa.binary(), "shape": pa.list_(pa.int64()), "dtype": pa.string()}
    if data.draw(st.booleans()):
        cells, kinds = TEXTS, dict.fromkeys(kinds, pa.string())
    else:
        cells = CELLS
    columns = {"file_name": pa.array(["a", "a"])}
    for name in ("vae_latent", "trajectory_latents", "trajectory_timesteps"):
        for part, kind in kinds.items():
            columns[f"{name}_{part}"] = pa.array([data.draw(cells[part]) for _ in range(2)], kind)
    pq.write_table(pa.table(columns), folder / "a.parquet")
    cache = LatentCache.open(folder)
    reader = CachedLatents(cache, backbone, (16, 3, 4, 4))
    clip = {"video": "a", "path": "a.mp4"}
    with contextlib.suppress(PrismError):
        reader.find([clip])
        reader(clip)
    for entry in cache.find("a"):
        with contextlib.suppress(PrismError):
            assert cache.read(entry, False).latent.isfinite().all()


def test_the_command_makes_the_store_without_clips(data, backbone, tmp_path, capsys):
    backbone.pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "pairs.jsonl").write_bytes(data.read_bytes())  # no clip beside it
    cache = tmp_path / "cache"
    for number, name in enumerate(NAMES):
        musubi(cache, name, torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(number)))
    words = ["encode", str(tmp_path / "pairs.jsonl"), "--latents", str(cache), "--backbone", str(tmp_path / "pipe")]
    words += ["--num-frames", "9", "--height", "32", "--width", "32", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--start", "first"]) == 2
    assert "--start has no meaning" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(words) == 0
    assert "6 clips and 3 pairs" in capsys.readouterr().out
