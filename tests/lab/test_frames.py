"""Decoded frames kept on disk: the same bytes as decoding gives, found again, shared, and never stale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import stores, tiny

from prism.backbone import Backbone
from prism.errors import PrismError
from prism.lab.pixel import PixelJudge
from prism.lab.pixel_training import DecodedCache, PixelConfig, train_pixel

SMALL = {"width": 8, "layers": 1}
PROMPTS = [tiny.PROMPT, tiny.OTHER_PROMPT, tiny.PROMPT]


@pytest.fixture(scope="module")
def backbone():
    return Backbone(tiny.wan())


def latents(rows=3):
    return torch.randn(rows, *stores.SHAPE, generator=torch.Generator().manual_seed(3))


def test_the_bytes_are_what_the_vae_decodes_and_are_decoded_once(backbone, tmp_path):
    cache, noisy = DecodedCache(tmp_path / "frames", backbone), latents()
    expected = (backbone.decode(noisy) * 255).round()
    found = cache(noisy)
    assert found.dtype == torch.uint8
    assert found.shape == (3, 9, 32, 32, 3)
    assert (found.float() - expected).abs().max() <= 1  # a batch may round otherwise than one alone
    assert (cache.decoded, len(cache)) == (3, 3)
    again = DecodedCache(tmp_path / "frames", backbone)  # another run
    assert torch.equal(again(noisy.flip(0)), found.flip(0))
    assert (again.decoded, len(again)) == (0, 3)
    assert not torch.equal(again(noisy[:1] + 0.01), found[:1])
    assert (again.decoded, len(again)) == (1, 4)
    assert sum(path.stat().st_size for path in (tmp_path / "frames").glob("*.npy")) == 4 * (128 + 9 * 32 * 32 * 3)


def test_scores_are_the_same_with_it_and_a_second_judge_decodes_nothing(backbone, tmp_path):
    plain = PixelJudge.untrained(backbone, ("VQ", "MQ"), **SMALL)
    plain.save_pretrained(tmp_path / "pixel")
    scores = PixelJudge.from_pretrained(tmp_path / "pixel", backbone).score(latents(), PROMPTS, 700, **tiny.CALL_WAN)
    cache = DecodedCache(tmp_path / "frames", backbone)
    for decoded in (3, 3):
        judge = PixelJudge.from_pretrained(tmp_path / "pixel", backbone, cache)
        assert torch.equal(judge.score(latents(), PROMPTS, 700, **tiny.CALL_WAN), scores)
        assert cache.decoded == decoded


def test_a_damaged_file_is_decoded_anew_and_an_unfinished_one_is_not_read(backbone, tmp_path):
    cache = DecodedCache(tmp_path, backbone)
    found = cache(latents())
    paths = sorted(tmp_path.glob("*.npy"))
    paths[0].write_bytes(paths[0].read_bytes()[:100])
    paths[1].unlink()
    paths[1].with_suffix(".7.partial").write_bytes(b"half")
    assert torch.equal(cache(latents()), found)
    assert cache.decoded == 5
    np.testing.assert_array_equal(np.load(paths[0], allow_pickle=False).shape, (9, 32, 32, 3))


def test_other_weights_of_the_vae_and_other_folders_are_refused(backbone, tmp_path):
    DecodedCache(tmp_path / "frames", backbone)
    other = tiny.wan(seed=1)  # the same configuration
    with pytest.raises(PrismError, match="another VAE"):
        DecodedCache(tmp_path / "frames", Backbone(other))
    (tmp_path / "frames" / "cache.json").write_text("{}")
    with pytest.raises(PrismError, match="schema 1"):
        DecodedCache(tmp_path / "frames", backbone)
    (tmp_path / "taken" / "inner").mkdir(parents=True)
    with pytest.raises(PrismError, match="something else"):
        DecodedCache(tmp_path / "taken", backbone)
    (tmp_path / "file").write_text("")
    with pytest.raises(PrismError, match="cannot be kept"):
        DecodedCache(tmp_path / "file", backbone)


def test_processes_that_begin_a_folder_at_once_do_not_take_each_other_for_strangers(backbone, tmp_path, monkeypatch):
    (tmp_path / "writing" / ".cache.json.prism-0123abcd").mkdir(parents=True)  # another's label is on its way
    assert DecodedCache(tmp_path / "writing", backbone)(latents(1)).shape[0] == 1
    begin = DecodedCache._begin

    def after_another(cache, label, wanted):
        monkeypatch.setattr(DecodedCache, "_begin", begin)
        DecodedCache(cache.folder, backbone)(latents(1))  # looked after us, and has decoded since
        begin(cache, label, wanted)

    monkeypatch.setattr(DecodedCache, "_begin", after_another)
    late = DecodedCache(tmp_path / "late", backbone)
    late(latents(1))
    assert late.decoded == 0


def test_a_full_disk_is_told_and_leaves_no_half_file(backbone, tmp_path, monkeypatch):
    cache = DecodedCache(tmp_path, backbone)

    def full(stream, *_args, **_options):
        stream.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(PrismError, match="No space left on device; make room"):
        cache(latents(1))
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]


def test_seeds_trained_on_one_cache_decode_its_clean_videos_once(backbone, tmp_path):
    store, cache = stores.make(tmp_path / "store"), DecodedCache(tmp_path / "frames", backbone)
    groups = [*store.groups("train"), *store.groups("validation")]
    videos = sum(len(group.videos) for group in groups)
    decoded = []
    for seed in (0, 1):
        config = PixelConfig(steps=3, prompts_per_step=2, validate_every=3, seed=seed, **SMALL)
        decoded.append(
            train_pixel(store, backbone, config, tmp_path / f"{seed}", progress=False, frames=cache)["decoded"]
        )
    assert decoded == [videos, 0]
    assert len(cache) == videos


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be 1 or more, found 0"),
        ({"width": 12}, "width must be a multiple of 8, found 12"),
        ({"noise_draws": 0}, "noise_draws must be 1 or more, found 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, found 1.0"),
        ({"precision": "half"}, "precision must be auto, float32 or bfloat16, found 'half'"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(PrismError, match=message):
        PixelConfig(**settings)
