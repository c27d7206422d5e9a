"""The generator's parts: the closed-form encoder against principal components, the decoder's shortcut against the stock
loop, training that resumes, candidates that resume, assets that are checked."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from safetensors import SafetensorError
from tests import kills, tiny

from prism import cli, files
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.preference import LatentStore
from prism.shapeworld import CALL, candidates, generator, grammar, referee, train, world
from prism.shapeworld import generator as video_vae
from prism.team import Team


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    built = video_vae.build().eval()
    built.lost = video_vae.fit_encoder(built, seed=0, videos=24)
    return built


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    return tiny.shapeworld()


def test_the_fitted_encoder_comes_close_to_principal_components(vae):
    pixels = video_vae.to_input(world.sample(24, seed=0)[0])
    lost = total = 0.0
    for frames in (pixels[:, :, :1], pixels[:, :, 1:]):
        step = min(4, frames.shape[2])
        blocks = frames.unfold(2, step, step).unfold(3, 16, 16).unfold(4, 16, 16).permute(0, 2, 3, 4, 1, 5, 6, 7)
        rows = blocks.reshape(-1, 3 * step * 256)
        centred = (rows - rows.mean(0)).double()
        products = centred @ centred.T if len(rows) < rows.shape[1] else centred.T @ centred
        kept = torch.linalg.eigvalsh(products)[-video_vae.LATENT_CHANNELS :].sum().item()
        spread = centred.square().sum().item()
        lost, total = lost + spread - kept, total + spread
    assert lost / total < vae.lost < 1.05 * lost / total


def test_the_encoder_is_one_matrix_a_block(vae):
    video, _ = world.sample(4, seed=5)
    latents = video_vae.encode(vae, video_vae.to_input(video))
    assert latents.shape == (4, 48, 5, 4, 4)
    assert torch.allclose(video_vae.LinearCode.of(vae)(video), latents, atol=1e-3)


def test_decoding_all_frames_at_once_is_the_stock_decoder(vae):
    latents = torch.randn(2, 48, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = vae.decode(latents).sample
        once = unpatchify(video_vae.decode_unclamped(vae, latents), vae.config.patch_size).clamp(-1, 1)
    assert torch.allclose(stock, once, atol=1e-5)


def test_training_resumes_to_the_same_weights(tmp_path, vae, monkeypatch):
    settings = train.PartConfig(4, 2, 1e-3, videos=16, matrix_rate=1e-2, layers=2, heads=1, snapshots=(3,))
    monkeypatch.setitem(train.DEFAULTS, "transformer", settings)
    for name in ("whole", "cut"):
        vae.save_pretrained(tmp_path / name / "vae" / "fitted")
    train.run(tmp_path / "whole", "transformer")

    real = train.fit

    def killed(modules, loss_at, *arguments, team):
        def loss(step):
            if step == 2:
                raise KeyboardInterrupt
            return loss_at(step)

        real(modules, loss, *arguments, checkpoint_every=1, team=team)

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            train.run(tmp_path / "cut", "transformer")
    with pytest.raises(PrismError, match="--resume"):
        train.run(tmp_path / "cut", "transformer")
    with pytest.raises(PrismError, match=r"differs in learning_rate: it was 0\.001 and is now 1\.0"):
        train.run(tmp_path / "cut", "transformer", learning_rate=1.0, resume=True)
    train.run(tmp_path / "cut", "transformer", resume=True)
    early = [candidates.snapshot(tmp_path / name, 3).transformer.state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(value, early[1][key]) for key, value in early[0].items())
    with pytest.raises(PrismError, match="step 2"):
        candidates.snapshot(tmp_path / "whole", 2)

    for part in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        one, two = (files.load_safetensors(tmp_path / name / "transformer" / part) for name in ("whole", "cut"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_takes_other_steps_until_its_step_size_falls(tmp_path, vae, monkeypatch):
    settings = train.PartConfig(10, 2, 1e-3, videos=16, layers=1, heads=1)
    monkeypatch.setitem(train.DEFAULTS, "transformer", settings)
    monkeypatch.setattr(train.fit, "__defaults__", (0.0, (), 0.999, 1, 1))  # a checkpoint each step
    vae.save_pretrained(tmp_path / "vae" / "fitted")
    real = train.fit

    def killed(modules, loss_at, *arguments, team):
        def loss(step):
            if step == 6:
                raise KeyboardInterrupt
            return loss_at(step)

        real(modules, loss, *arguments, team=team)

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            train.run(tmp_path, "transformer")
    with pytest.raises(PrismError, match="--steps 10"):
        train.run(tmp_path, "transformer", resume=True, steps=8)
    train.run(tmp_path, "transformer", resume=True, steps=9)
    assert files.read_json(tmp_path / "transformer" / "config.json")["steps"] == 9


def test_a_run_trains_on_earlier_weights(tmp_path, vae, monkeypatch):
    monkeypatch.setitem(train.DEFAULTS, "transformer", train.PartConfig(2, 2, 1e-3, videos=4, layers=2, heads=1))
    earlier = tmp_path / "earlier"
    vae.save_pretrained(earlier / "vae" / "fitted")
    shutil.copytree(earlier / "vae", tmp_path / "on" / "vae")
    train.run(earlier, "transformer")
    with pytest.raises(PrismError, match=r"--start .* holds no transformer"):
        train.run(tmp_path / "on", "transformer", start=str(earlier))
    train.run(tmp_path / "on", "transformer", start=str(earlier / "transformer"), steps=1, learning_rate=1e-7)
    for part in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        before, after = (files.load_safetensors(run / "transformer" / part) for run in (earlier, tmp_path / "on"))
        assert max((after[key] - before[key]).abs().max() for key in before) < 1e-6
        assert any(not torch.equal(after[key], before[key]) for key in before)


def test_muon_trains_the_blocks_and_adamw_the_rest(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    model["out"] = torch.nn.Linear(4, 4)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    x = torch.randn(8, 4)
    loss = lambda step: model["out"](model["blocks"][0](x)).square().mean()  # noqa: E731
    oracle = {name: value.detach().clone().requires_grad_() for name, value in before.items()}
    train.fit({"model": model}, loss, tmp_path, 1, 1e-3, matrix_rate=1e-2, warmup=1, ema_decay=0.0)
    hidden = x @ oracle["blocks.0.weight"].T + oracle["blocks.0.bias"]
    (hidden @ oracle["out.weight"].T + oracle["out.bias"]).square().mean().backward()
    moved = {name: value.detach() - before[name] for name, value in model.named_parameters()}
    # Muon: orthogonalised, scaled to AdamW's size; AdamW: the sign of the gradient in the first step
    assert moved["blocks.0.weight"].norm() == pytest.approx(1e-2 * 0.2 * 4, rel=0.3)
    sign = -1e-3 * oracle["out.weight"].grad.sign() - 1e-5 * before["out.weight"]
    assert torch.allclose(moved["out.weight"], sign, atol=1e-5)


def test_a_kill_while_the_pool_is_written_leaves_none(tmp_path, vae, monkeypatch):
    def killed(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    code = video_vae.LinearCode.of(vae)
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            train._latent_pool(tmp_path, code, 4, seed=0, team=Team())
    made, prompts = train._latent_pool(tmp_path, code, 4, seed=0, team=Team())
    read, same = train._latent_pool(tmp_path, code, 4, seed=0, team=Team())
    assert torch.equal(made, read)
    assert prompts == same


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(PrismError, match=r"checkpoint\.safetensors"):
        train.fit({"layer": torch.nn.Linear(2, 2)}, lambda step: torch.zeros(()), tmp_path, 1, 1e-3)


def test_training_the_vae_lowers_its_error_and_makes_a_stock_pipeline(tmp_path, vae, monkeypatch):
    monkeypatch.setitem(train.DEFAULTS, "vae", train.PartConfig(12, 2, 2e-3))
    monkeypatch.setitem(train.DEFAULTS, "transformer", train.PartConfig(1, 2, 1e-3, videos=4, layers=1, heads=1))
    monkeypatch.setattr(train.fit, "__defaults__", (0.0, (), 0.5, 250, 1))  # EMA, checkpoints, warm-up
    vae.save_pretrained(tmp_path / "vae" / "fitted")
    train.run(tmp_path)
    trained = AutoencoderKLWan.from_pretrained(tmp_path / "vae" / "vae")
    video = video_vae.to_input(world.sample(4, seed=99)[0])
    with torch.no_grad():
        before, after = (
            (model.decode(video_vae.encode(model, video)).sample - video).square().mean() for model in (vae, trained)
        )
    assert after < 0.7 * before
    folder = tmp_path / "pipeline"
    loaded = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert type(loaded) is WanPipeline
    assert files.read_json(folder / "call.json") == CALL
    assert loaded(grammar.prompts("test")[0], **{**CALL, "num_inference_steps": 1}).frames.shape == (1, 17, 64, 64, 3)


def test_bad_training_settings_are_refused(tmp_path):
    for wrong in ({"part": "head"}, {"steps": 0}, {"learning_rate": -1.0}, {"heads": 0}, {"start": "nowhere"}):
        with pytest.raises(PrismError):
            train.run(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_quality_is_the_referees_of_the_stock_pipelines_videos(pipe, monkeypatch):
    prompts = [grammar.prompts("validation", 2, kind)[i] for kind in grammar.KINDS for i in range(2)]
    call = {**CALL, "num_inference_steps": 1}
    monkeypatch.setattr(referee, "batch", lambda videos, names: dict.fromkeys(referee.DIMENSIONS, _mean(videos)))
    found = candidates.measure(pipe, prompts, per_prompt=3, seed=4, call=call)
    seeds = [[candidates.candidate_seed(4, prompt, i) for i in range(3)] for prompt in prompts]
    videos = [
        pipe([p] * 3, generator=[torch.Generator().manual_seed(s) for s in row], output_type="pt", **call).frames
        for p, row in zip(prompts, seeds, strict=True)
    ]
    values = torch.stack([_mean(video) for video in videos]).double()
    for kind, rows in (("single", values[:2]), ("pair", values[2:]), ("all", values)):
        assert found[kind]["videos"] == rows.numel()
        assert found[kind]["mean"]["overall"] == pytest.approx(rows.mean().item(), abs=1e-5)
        within, total = rows.var(1).mean().sqrt().item(), rows.std().item()
        assert found[kind]["within_sd"] == pytest.approx(within, rel=1e-3)
        assert found[kind]["within_over_total"] == pytest.approx(within / total, rel=1e-3)
    right = referee.correct(torch.cat(videos[:2]).movedim(2, -1), [p for p in prompts[:2] for _ in range(3)])
    assert found["single"]["right"]["colour"] == pytest.approx(right["colour"].mean().item())


def _mean(videos: torch.Tensor) -> torch.Tensor:
    return videos.flatten(1).mean(1)


def test_candidates_are_the_stock_pipelines_and_labelled_by_the_referee(tmp_path, pipe, monkeypatch):
    monkeypatch.setitem(CALL, "num_inference_steps", 2)
    monkeypatch.setattr(candidates, "BATCH", 4)
    some = {"train": grammar.prompts("train")[:2], "test": grammar.prompts("test")[:1]}
    monkeypatch.setattr(grammar, "prompts", lambda split, count: some[split][:count])
    backbone = Backbone(pipe)
    sample, calls = candidates.sample, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*arguments)

    options = {"splits": {"train": (2, 2), "test": (1, 2)}, "trajectories": True, "backbone": backbone}
    foreign = tmp_path / "other.parts" / "sub" / "thesis.tex"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("x")
    for overwrite in (False, True):
        with pytest.raises(PrismError, match="holds no parts of a run"):
            candidates.run(tmp_path / "other", **options, overwrite=overwrite)
    assert foreign.read_text() == "x"
    shutil.rmtree(tmp_path / "other.parts")
    with monkeypatch.context() as patch:
        patch.setattr(candidates, "sample", killed)
        with pytest.raises(KeyboardInterrupt):
            candidates.run(tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()
    with pytest.raises(PrismError, match="differs in seed: it was 0 and is now 1"):
        candidates.run(tmp_path / "store", **options, seed=1)
    part = tmp_path / "store.parts" / "00000.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-50])
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(candidates, "sample", killed)
        with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="00000.*It is made anew"):
            candidates.run(tmp_path / "store", **options)
    assert part.read_bytes() == whole
    candidates.run(tmp_path / "store", **options)  # the first part is not sampled again
    assert [path.name for path in tmp_path.iterdir()] == ["store"]

    store = LatentStore.open(tmp_path / "store")
    assert store.videos.num_rows == 6
    assert store.pairs.num_rows == 3
    row = store.videos.slice(5, 1).to_pylist()[0]
    assert row["prompt"] == some["test"][0]
    assert row["seed"] == candidates.candidate_seed(0, row["prompt"], 1)
    video = pipe(row["prompt"], generator=torch.Generator().manual_seed(row["seed"]), **CALL)
    truth = referee.score(torch.tensor(video.frames[0]), row["prompt"])
    assert truth == pytest.approx({name: row[name] for name in truth}, abs=1e-3)  # a batch rounds otherwise
    latents = pipe(
        row["prompt"], generator=torch.Generator().manual_seed(row["seed"]), output_type="latent", **CALL
    ).frames
    assert torch.allclose(store.latents([row["video"]]), latents, atol=2e-2)
    states, t = store.trajectory([row["video"]])
    assert states.shape == (1, 1, 48, 5, 4, 4)
    assert 0 < t[0, 0] < 1000


def test_candidates_outlive_a_kill_anywhere(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr(candidates, "BATCH", 2)
    monkeypatch.setattr(grammar, "prompts", lambda split, count: ["a red circle", "a blue circle"][:count])
    backbone, log = Backbone(pipe), tmp_path / "log"
    fingerprint = backbone.fingerprint()
    monkeypatch.setattr(backbone, "fingerprint", lambda: fingerprint)

    def sample(_backbone, _call, chunk, _trajectories):
        with log.open("a") as file:
            file.write(f"{chunk[0][1]}\n")
        scores = torch.tensor([seed % 97 / 97 for _, _, seed in chunk])
        part = {f"score/{name}": scores.clone() for name in referee.DIMENSIONS}
        return {**part, "latents": scores.view(-1, 1, 1, 1).half()}

    monkeypatch.setattr(candidates, "sample", sample)
    out, parts = tmp_path / "runs" / "store", tmp_path / "runs" / "store.parts"
    work = partial(candidates.run, out, {"train": (2, 2)}, backbone=backbone)
    work()
    whole, point, repeats = {path.name: path.read_bytes() for path in out.iterdir()}, 1, set()
    while True:
        shutil.rmtree(out)
        shutil.rmtree(parts, ignore_errors=True)
        log.write_text("")
        if not kills.dies(work, out.parent, point):
            break
        begun, done = len(log.read_text().split("\n")) - 1, len(list(parts.glob("0000?.safetensors")))
        if not out.exists():
            work()
            again = len(log.read_text().split("\n")) - 1 - begun
            assert again == 2 - done  # what is missing, and nothing twice
            repeats.add(begun + again - 2)
            assert [path.name for path in out.parent.iterdir()] == ["store"]
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
        point += 3
    assert point > 30
    assert repeats == {0, 1}


def test_a_kill_while_the_log_is_cut_loses_no_row_before_the_checkpoint(tmp_path):
    rows = [json.dumps({"step": step}) + "\n" for step in (50, 100, 150)]
    log, point = tmp_path / "part" / "log.jsonl", 1
    log.parent.mkdir()
    while True:
        log.write_text("".join(rows) + '{"step": 2')  # a row that a kill cut off
        if not kills.dies(lambda: train._cut_log(log, 100), log.parent, point):
            break
        assert log.read_text().startswith("".join(rows[:2]))
        point += 1
    assert point > 3
    assert log.read_text() == "".join(rows[:2])


def test_assets_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    with pytest.raises(PrismError, match=r"manifest.json is missing"):
        generator.asset_folder("pipeline")
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"weights")
    generator.write_manifest(folder)
    assert generator.asset_folder("pipeline") == folder
    (folder / "weights.safetensors").write_bytes(b"Weights")
    with pytest.raises(PrismError, match="altered"):
        generator.asset_folder("pipeline")
    shutil.rmtree(folder)
    with pytest.raises(PrismError, match="missing"):
        generator.asset_folder("pipeline")


def test_a_run_out_of_disk_says_so_and_resumes(tmp_path, vae, monkeypatch, capsys):
    monkeypatch.setitem(train.DEFAULTS, "transformer", train.PartConfig(2, 2, 1e-3, videos=4, layers=1, heads=1))
    vae.save_pretrained(tmp_path / "vae" / "fitted")
    real = train.save_file

    def full(tensors, path, metadata=None):
        if path.name == "checkpoint.safetensors":  # the words of safetensors on a full disk
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, path, metadata=metadata)

    command = ["shapeworld", "train", "--part", "transformer", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_file", full)
        assert cli.main(command) == 2
    assert "no space left" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert (tmp_path / "transformer" / "transformer" / "config.json").is_file()
