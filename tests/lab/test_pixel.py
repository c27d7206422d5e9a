"""The pixel judge on a tiny real pipeline: it sees what the VAE decodes, learns, resumes, and refuses another VAE."""

from __future__ import annotations

import copy
import dataclasses
import json

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from tests import stores, tiny
from tests.zoo import VARIANTS

from prism import files
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation import compare_judges, measure, measure_together
from prism.judge import Judge
from prism.lab.pixel import JointPixelJudge, PixelJudge, PixelNetwork
from prism.lab.pixel_training import DecodedCache, PixelConfig, train_pixel
from prism.preference import LatentStore, pairs_from_scores, write_store

PROMPTS = [tiny.PROMPT, tiny.OTHER_PROMPT, tiny.PROMPT]
DIMENSIONS = ("VQ", "MQ")
SMALL = {"width": 16, "layers": 1}
CONFIG = PixelConfig(steps=6, prompts_per_step=2, validate_every=2, **SMALL)


@pytest.fixture(scope="module")
def backbone():
    """Of a VAE whose random decoder was given contrast: untouched, all that it decodes is the same grey."""
    pipe = tiny.wan()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.mul_(10)
    return Backbone(pipe)


@pytest.fixture(scope="module")
def judge(backbone):
    return PixelJudge.untrained(backbone, DIMENSIONS, **SMALL)


@pytest.fixture(scope="module")
def store(backbone, tmp_path_factory):
    """Videos with a pattern in them: VQ is how much of it there is, and MQ how little."""
    folder, prompts, per_prompt = tmp_path_factory.mktemp("pixel") / "store", (28, 3, 8), 4
    count = sum(prompts) * per_prompt
    generator = torch.Generator().manual_seed(0)
    amount = 2 * torch.rand(count, generator=generator) - 1
    latents = 2 * amount.view(-1, 1, 1, 1, 1) * torch.randn(stores.SHAPE, generator=generator)
    latents += 0.2 * torch.randn(count, *stores.SHAPE, generator=generator)
    splits = [name for name, n in zip(("train", "validation", "test"), prompts) for _ in range(n * per_prompt)]
    rows = {
        "video": [f"video-{i:03d}" for i in range(count)],
        "prompt": [stores.PROMPTS[i // per_prompt] for i in range(count)],
        "seed": list(range(count)),
        "split": splits,
        "VQ": amount.tolist(),
        "MQ": (-amount).tolist(),
    }
    videos = pa.table(rows)
    with files.new_folder(folder) as temporary:
        pairs = pairs_from_scores(videos, dict.fromkeys(DIMENSIONS, 0.4))
        write_store(temporary, videos, latents, pairs, {"call": tiny.CALL_WAN, "command": "test", "seed": 0})
    return LatentStore.open(folder)


@pytest.fixture(scope="module")
def frames(backbone, tmp_path_factory):
    """Decoding is what these tests' time would go into."""
    return DecodedCache(tmp_path_factory.mktemp("pixel") / "frames", backbone)


def latents(rows=3):
    return torch.randn(rows, *stores.SHAPE, generator=torch.Generator().manual_seed(3))


def text_of(pipe, prompts):
    """The prompts as the pipeline itself would give them to its denoiser."""
    return pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=12)[0]


def test_a_score_is_the_network_on_the_decoded_latent_and_the_pipelines_text(backbone, judge):
    """Oracle: the stock VAE's decoder and the stock text encoder, and the network by hand."""
    pipe, noisy = backbone.pipe, latents()
    config = pipe.vae.config
    mean, std = (torch.tensor(value).view(1, -1, 1, 1, 1) for value in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        frames = (pipe.vae.decode(noisy * std + mean).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
        embeds = text_of(pipe, PROMPTS)
        frames = (frames * 255).round() / 255  # as in a video file
        expected = judge.head.eval()(frames, embeds, embeds.ne(0).any(-1))
    scores = judge.score(noisy, PROMPTS, 700, **tiny.CALL_WAN)
    assert scores.shape == (3, 2)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(scores, judge.score(noisy, PROMPTS, 0, **tiny.CALL_WAN))  # t tells it nothing
    torch.testing.assert_close(judge.score_videos(frames, PROMPTS, **tiny.CALL_WAN), expected)


def test_it_reads_the_prompt_and_not_its_padding(backbone, judge):
    frames, embeds = backbone.decode(latents(1)), text_of(backbone.pipe, [tiny.PROMPT])
    mask = embeds.ne(0).any(-1)
    assert 0 < mask.sum() < mask.numel()
    other = judge.score_videos(frames, tiny.OTHER_PROMPT, **tiny.CALL_WAN)
    assert (judge.score_videos(frames, tiny.PROMPT, **tiny.CALL_WAN) - other).abs().max() > 1e-4
    with torch.no_grad():
        noise = torch.where(mask[..., None], embeds, torch.randn_like(embeds))
        torch.testing.assert_close(judge.head.eval()(frames, noise, mask), judge.head(frames, embeds, mask))


def test_a_score_does_not_depend_on_the_rows_beside_it(judge):
    noisy = latents(19)  # more than the network looks at together
    names = [PROMPTS[row // 3 % 2] for row in range(19)]
    together = judge.score(noisy, names, 500, **tiny.CALL_WAN)
    apart = torch.cat([judge.score(noisy[i : i + 1], names[i], 500, **tiny.CALL_WAN) for i in range(19)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_finished_latents_get_the_noise_that_the_judge_on_hidden_states_gives_them(backbone, judge, monkeypatch):
    """Both are asked with equal generators; what each hands to its own `score` must be equal to the bit."""
    seen = {}
    ours = Judge.untrained(backbone, tap=2, dimensions=DIMENSIONS)
    for other in (ours, judge):
        states = seen[other.name] = []

        def score(noisy, prompts, t, states=states, **call):
            states.append(noisy)
            return torch.zeros(len(noisy), len(DIMENSIONS))

        monkeypatch.setattr(other, "score", score)
        other.score_clean(latents(), PROMPTS, 600, 2, torch.Generator().manual_seed(8), **tiny.CALL_WAN)
    assert len(seen["prism"]) == len(seen["pixel"]) == 2
    assert all(torch.equal(*states) for states in zip(seen["prism"], seen["pixel"]))
    monkeypatch.undo()
    mean, error = judge.score_clean(latents(), PROMPTS, 600, 2, torch.Generator().manual_seed(8), **tiny.CALL_WAN)
    draws = torch.stack([judge.score(noisy, PROMPTS, 600, **tiny.CALL_WAN) for noisy in seen["pixel"]])
    torch.testing.assert_close(mean, draws.mean(0))
    torch.testing.assert_close(error, (draws[0] - draws[1]).abs() / 2)


def test_it_learns_what_frames_show_and_is_measured_like_the_judge(backbone, store, frames, tmp_path):
    config = dataclasses.replace(CONFIG, steps=60, prompts_per_step=4, learning_rate=3e-3, validate_every=20)
    result = train_pixel(store, backbone, config, tmp_path / "pixel", progress=False, frames=frames)
    pixel = PixelJudge.from_pretrained(tmp_path / "pixel", backbone, frames)
    assert result["steps"] == 60
    assert result["parameters"] == sum(value.numel() for value in pixel.head.parameters())
    assert [entry["step"] for entry in result["history"] if "validation" in entry] == [20, 40, 60]
    assert not (tmp_path / "pixel.parts").exists()

    found = measure(pixel, store, "test", (0, 899), progress=False)
    accuracy = {(row["t"], row["dimension"]): row["without_ties"] for row in found.rows}
    assert accuracy[0, "VQ"] > 0.9
    assert accuracy[0, "MQ"] > 0.9
    assert {row["judge"] for row in found.rows} == {"pixel"}
    ours = measure(Judge.untrained(backbone, tap=2, dimensions=DIMENSIONS), store, "test", (0, 899), progress=False)
    rows = compare_judges([ours], found, 0)
    assert {(row["judge"], row["against"]) for row in rows} == {("prism", "pixel")}
    with pytest.raises(PrismError, match="trained on the prompt"):
        measure(pixel, pretend(store, "train", "test"), "test", (0,), progress=False)


def test_measured_together_each_is_as_alone_and_a_latent_is_decoded_once(backbone, store, frames):
    judges = [PixelJudge.untrained(backbone, DIMENSIONS, seed=seed, call=tiny.CALL_WAN, **SMALL) for seed in range(2)]
    judges[0].frames = counted = Counted(frames)
    together = measure_together(judges, store, "test", (899,), progress=False, joint=JointPixelJudge)
    assert counted.rows == 4 * (3 + 8)  # of validation and test prompts
    judges[1].frames = frames
    for judge, measured in zip(judges, together):
        alone = measure(judge, store, "test", (899,), progress=False)
        assert measured.pairs.equals(alone.pairs)
        assert measured.tuning.equals(alone.tuning)


class Counted:
    """A cache of frames that counts the latents it was asked for."""

    def __init__(self, frames):
        self.frames, self.rows = frames, 0

    def __call__(self, latents):
        self.rows += len(latents)
        return self.frames(latents)


def pretend(store: LatentStore, split: str, to: str) -> LatentStore:
    """The same store, one split taken for another."""
    groups = store.groups(split, DIMENSIONS)
    other = copy.copy(store)
    other.groups = lambda name, dimensions=None: groups if name == to else store.groups(name, dimensions)
    return other


def test_the_noise_trained_one_also_sees_noisy_decodes(backbone, store, frames, tmp_path, monkeypatch):
    """What the network is given in training, told apart by looking the frames up among the clean ones."""
    train_videos = [video for group in store.groups("train", DIMENSIONS) for video in group.videos]
    clean = frames(store.latents(train_videos)).float() / 255
    shares = {}
    for noisy in (False, True):
        given = spy(monkeypatch)
        config = dataclasses.replace(CONFIG, steps=8, validate_every=8)
        train_pixel(store, backbone, config, tmp_path / f"{noisy}", noisy=noisy, progress=False, frames=frames)
        monkeypatch.undo()
        apart = torch.cdist(torch.cat(given).flatten(1), clean.flatten(1), p=torch.inf).amin(1)
        shares[noisy] = (apart < 0.5 / 255).float().mean()
        assert PixelJudge.from_pretrained(tmp_path / f"{noisy}", backbone).name == ("pixel-noisy" if noisy else "pixel")
    assert shares[False] == 1
    assert 0.2 < shares[True] < 0.8


def spy(monkeypatch) -> list[torch.Tensor]:
    """The frames of every training batch, as the network gets them."""
    given: list[torch.Tensor] = []
    forward = PixelNetwork.forward

    def watched(self, videos, *args):
        if self.training:
            given.append(videos.clone())
        return forward(self, videos, *args)

    monkeypatch.setattr(PixelNetwork, "forward", watched)
    return given


def test_a_run_that_was_killed_goes_on_to_the_same_weights(backbone, store, frames, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, steps=10, validate_every=5)
    checkpoint_often(monkeypatch)
    whole = train_pixel(store, backbone, config, tmp_path / "whole", noisy=True, progress=False, frames=frames)

    forward, calls = PixelNetwork.forward, []

    def dies(self, *args):
        if self.training:
            calls.append(1)
            if len(calls) == 7:
                raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(PixelNetwork, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        train_pixel(store, backbone, config, tmp_path / "killed", noisy=True, progress=False, frames=frames)
    assert not (tmp_path / "killed").exists()
    calls.extend([1] * 1000)
    torch.manual_seed(5)  # another process has another random state
    before = len(calls)
    resumed = train_pixel(store, backbone, config, tmp_path / "killed", noisy=True, progress=False)
    assert len(calls) - before == 6  # from the checkpoint after four on
    assert resumed["history"] == whole["history"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def checkpoint_often(monkeypatch) -> None:
    settings = PixelConfig.for_learner
    monkeypatch.setattr(
        PixelConfig, "for_learner", lambda self: dataclasses.replace(settings(self), checkpoint_every=4)
    )


def test_saved_and_loaded_it_scores_the_same_up_to_half_precision(backbone, judge, tmp_path):
    judge.save_pretrained(tmp_path / "pixel")
    assert sorted(path.name for path in (tmp_path / "pixel").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    loaded = PixelJudge.from_pretrained(tmp_path / "pixel", backbone.pipe)
    assert (loaded.dimensions, loaded.eta, loaded.name) == (DIMENSIONS, 5.0, "pixel")
    expected = judge.score(latents(), PROMPTS, 500, **tiny.CALL_WAN)
    scores = loaded.score(latents(), PROMPTS, 500, **tiny.CALL_WAN)
    torch.testing.assert_close(scores, expected, atol=5e-3, rtol=5e-3)
    loaded.save_pretrained(tmp_path / "again")
    files_alike = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("pixel", "again")]
    assert files_alike[0] == files_alike[1]
    with pytest.raises(PrismError, match="exist"):
        judge.save_pretrained(tmp_path / "pixel")


def test_a_shipped_judge_is_no_smaller_than_what_it_is_compared_with_and_below_four_megabytes(backbone, tmp_path):
    options = {name: getattr(PixelConfig(), name) for name in ("width", "layers")}
    whole = PixelJudge.untrained(backbone, ("VQ", "MQ", "TA", "overall"), **options)
    assert sum(value.numel() for value in whole.head.parameters()) >= 1_800_000  # a head 0.6 M, four blocks 1.2 M
    whole.save_pretrained(tmp_path / "pixel")
    assert (tmp_path / "pixel" / "model.safetensors").stat().st_size <= 4_000_000


def test_another_vae_and_damaged_folders_are_refused(backbone, judge, tmp_path):
    judge.save_pretrained(tmp_path / "pixel")
    with pytest.raises(PrismError, match=r"AutoencoderKLWan.*AutoencoderKLCogVideoX"):
        PixelJudge.from_pretrained(tmp_path / "pixel", tiny.cogvideox())
    bias = backbone.pipe.vae.decoder.conv_in.bias
    known = bias.detach().clone()
    with torch.no_grad():
        bias += 1
        with pytest.warns(UserWarning, match="frames of a VAE with other weights"):
            PixelJudge.from_pretrained(tmp_path / "pixel", backbone)
        bias.copy_(known)
    path = tmp_path / "pixel" / "config.json"
    config = json.loads(path.read_text())
    damaged = [{**config, "format": "other"}, [], *({**config, name: None} for name in ("network", "dimensions"))]
    damaged += [{key: value for key, value in config.items() if key != name} for name in ("eta", "network", "name")]
    for bad in damaged:
        path.write_text(json.dumps(bad))
        with pytest.raises(PrismError, match=r"config\.json"):
            PixelJudge.from_pretrained(tmp_path / "pixel", backbone)
    path.write_text(json.dumps({**config, "network": {**config["network"], "width": 24}}))
    with pytest.raises(PrismError, match=r"model\.safetensors"):
        PixelJudge.from_pretrained(tmp_path / "pixel", backbone)
    with pytest.raises(PrismError, match="does not exist"):
        PixelJudge.from_pretrained(tmp_path / "nowhere", backbone)


def test_bad_input_gets_a_sentence(backbone, judge, store, tmp_path):
    with pytest.raises(PrismError, match="2 for 3"):
        judge.score(latents(), PROMPTS[:2], 500, **tiny.CALL_WAN)
    with pytest.raises(PrismError, match="2 for 3"):
        judge.score_videos(backbone.decode(latents()), PROMPTS[:2], **tiny.CALL_WAN)
    for bad in (torch.nan, torch.inf):
        broken = latents(20)
        broken[19, 0, 0, 0, 0] = bad
        with pytest.raises(PrismError, match="Row 19 has no finite score; its latents"):
            judge.score(broken, tiny.PROMPT, 500, **tiny.CALL_WAN)
    videos = backbone.decode(latents())
    videos[2, 0] = torch.nan
    with pytest.raises(PrismError, match="The video of row 2 holds NaN or infinity"):
        judge.score_videos(videos, PROMPTS, **tiny.CALL_WAN)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("1")
    with pytest.raises(PrismError, match="exist"):
        train_pixel(store, backbone, CONFIG, tmp_path / "taken", progress=False)
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "thesis.tex").write_text("x")
    with pytest.raises(PrismError, match="holds no parts of a run"):
        train_pixel(store, backbone, CONFIG, tmp_path / "out", progress=False)
    assert (tmp_path / "out.parts" / "thesis.tex").read_text() == "x"
    with pytest.raises(PrismError, match="no validation pairs"):
        train_pixel(without_validation(store), backbone, CONFIG, tmp_path / "out", progress=False)


def without_validation(store: LatentStore) -> LatentStore:
    kept = store.pairs.filter(pa.compute.not_equal(store.pairs["split"], "validation"))
    other = copy.copy(store)
    other.pairs = kept
    return other


def test_it_works_on_another_family(tmp_path):
    """CogVideoX: another VAE, another layout of latents, text without a mask."""
    backbone = Backbone(tiny.cogvideox())
    pixel = PixelJudge.untrained(backbone, DIMENSIONS, **SMALL)
    noisy = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    scores = pixel.score(noisy, PROMPTS[:2], 500, **tiny.CALL_COGVIDEOX)
    embeds = pixel.backbone.condition(PROMPTS[:2], **tiny.CALL_COGVIDEOX).arguments["encoder_hidden_states"]
    mask = backbone.denoiser_call({"encoder_hidden_states": embeds}).text_mask
    with torch.no_grad():
        expected = pixel.head((backbone.decode(noisy) * 255).round() / 255, embeds, mask)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["wan21_i2v", "svd", "hunyuan_i2v"])
def test_pipelines_that_need_an_image_are_called_with_it(variant):
    pipe, call = VARIANTS[variant]()
    backbone = Backbone(pipe)
    prompt = tiny.PROMPT if backbone.family.takes_prompts else ""
    judge = PixelJudge.untrained(backbone, DIMENSIONS, call=call, **SMALL)
    noise = torch.randn(2, *backbone.condition([prompt], **call).shape)
    assert judge.score(noise, prompt, 500, **call).shape == (2, len(DIMENSIONS))
    with pytest.raises(PrismError):
        PixelJudge.untrained(backbone, DIMENSIONS, **SMALL)
