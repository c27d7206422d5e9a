"""A sound that is denoised beside the video: the winner's is the stock call's, and a judge reads past it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from tests import tiny
from tests.works import works
from tests.zoo.kandinsky6 import kandinsky6
from tests.zoo.ltx2 import ltx2, ltx2_in_context, ltx23

import prism
from prism import cli, files
from prism.backbone import Backbone
from prism.backbone.denoising import target_of
from prism.backbone.sounds import soundtrack
from prism.errors import PrismError

FAST: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}


def _built(made: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any], prism.Judge]:
    pipe, call = made
    return pipe, {**call, **FAST}, prism.Judge.untrained(pipe, dim=16)


@pytest.fixture(scope="module")
def built() -> tuple[Any, dict[str, Any], prism.Judge]:
    return _built(ltx23())


@pytest.fixture(scope="module")
def other() -> tuple[Any, dict[str, Any], prism.Judge]:
    return _built(kandinsky6())


@works(
    "Inputs and outputs",
    "pipelines that make a sound beside the video (LTX-2, Kandinsky 6)",
    "exact",
    "the winner's sound, `result.output.audio`, is the stock call's too; the judge reads the video's tokens with "
    "attention to the sound switched off, or without the sound",
)
@pytest.mark.parametrize("model", ["ltx23", "kandinsky6", "distilled"])
def test_the_winners_sound_is_the_stock_calls(built: Any, other: Any, model: str) -> None:
    """And what the judge reads in the run is what it reads of the same bare latents outside of it."""
    pipe, call, judge = {"ltx23": built, "kandinsky6": other}.get(model) or _built(kandinsky6(distilled=True))
    at_cut: list[torch.Tensor] = []

    def keep(_pipe: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        at_cut.extend([tensors["latents"].clone()] if step == 0 else [])
        return {}

    run: dict[str, Any] = {"n": 3, "schedule": [(2, 1)], **call}
    one, many = (prism.best_of_n(pipe, judge, tiny.PROMPT, batch_size=size, **run) for size in (1, 3))
    sounds = []
    for seed in one.seeds:
        generator = torch.Generator().manual_seed(seed)
        stock = pipe(tiny.PROMPT, generator=generator, callback_on_step_end=keep, **call)
        sounds.append(torch.as_tensor(stock.audio))
        if seed == one.seed:
            assert np.array_equal(one.video, stock.frames[0])
    assert torch.equal(torch.as_tensor(one.output.audio), sounds[one.index])
    assert torch.allclose(torch.as_tensor(many.output.audio), sounds[many.index], atol=1e-4)
    assert (sounds[0] - sounds[1]).abs().max() > 1e-2
    outside = judge.score(torch.cat(at_cut), [tiny.PROMPT] * 3, one.scores[0]["t"], **call)
    assert torch.allclose(torch.tensor(list(one.scores[0]["scores"].values())).T, outside, atol=1e-5)


def test_tokens_do_not_depend_on_the_sound(built: Any) -> None:
    """They do in a call as it is; and they depend on the noise level that the text is modulated by."""
    pipe, call, judge = built
    backbone, tap = judge.backbone, judge.tap
    z = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    condition = backbone.condition([tiny.PROMPT], **call)
    sound = condition.arguments["audio_hidden_states"]
    louder = replace(condition, arguments={**condition.arguments, "audio_hidden_states": sound + 3})
    read = [backbone.tokens(z, each, 500.0, tap).visual for each in (condition, louder)]
    assert torch.equal(*read)
    backbone = Backbone(pipe)
    heard = replace(backbone.family, read_arguments={})
    backbone.family = heard
    calls = [{**each.call(z, torch.tensor([500.0])), "isolate_modalities": False} for each in (condition, louder)]
    joint = [backbone.read(each, tap, True)[0].visual for each in calls]
    assert (joint[0] - joint[1]).abs().max() > 1e-3
    stale = replace(condition, followers=())
    assert (backbone.tokens(z, stale, 500.0, tap).visual - read[0]).abs().max() > 1e-3


def test_a_call_may_leave_the_sound_out(other: Any) -> None:
    """The judge, which reads without it, scores the first noise the same."""
    pipe, call, judge = other
    family, run = judge.backbone.family, {"n": 2, "schedule": [(1, 1)], "batch_size": 1, **call}
    silent, sounding = (prism.best_of_n(pipe, judge, tiny.PROMPT, sample_audio=on, **run) for on in (False, True))
    generator = torch.Generator().manual_seed(silent.seed)
    stock = pipe(tiny.PROMPT, generator=generator, sample_audio=False, **call)
    assert np.array_equal(silent.video, stock.frames[0])
    assert soundtrack(pipe, family, silent.output) is None
    sound, rate = soundtrack(pipe, family, sounding.output) or (None, 0)
    assert np.array_equal(sound, sounding.output.audio)  # (channels, samples): it is mono
    assert rate == 256
    assert silent.scores == sounding.scores


def test_the_loops_latents_may_hold_a_conditions_tokens() -> None:
    """They are read as the video's alone; candidates part where both can be told from noise."""
    pipe, call = ltx2_in_context()
    judge = prism.Judge.untrained(pipe, dim=16)
    latents = torch.randn(1, 104, 8, generator=torch.Generator().manual_seed(0))
    score = [judge.score(each, [tiny.PROMPT], 500.0, **call) for each in (latents, latents[:, :64])]
    assert torch.equal(*score)
    with pytest.raises(PrismError, match=r"shape \(1, 103, 8\), and the pipeline's call makes \(B, 64, 8\)"):
        judge.score(latents[:, :103], [tiny.PROMPT], 500.0, **call)
    with pytest.raises(PrismError, match="where the frames of 'conditions' cannot be told from noise"):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=4, strategy="beam", **{**call, "num_inference_steps": 4})


def test_sample_writes_the_sound_beside_the_video(built: Any, tmp_path: Path) -> None:
    pipe, call = ltx2()
    call = {**call, "num_inference_steps": 3}
    pipe.save_pretrained(tmp_path / "pipe")
    files.write_json(tmp_path / "pipe" / "call.json", call)
    out = tmp_path / "run"
    command = ["sample", "--prompt", tiny.PROMPT, "--n", "1", "--strategy", "none", "--out", str(out)]
    assert cli.main([*command, "--backbone", str(tmp_path / "pipe")]) == 0
    seed = json.loads((out / "metrics.json").read_text())["top"][0]["seed"]
    stock = Backbone.from_pretrained(str(tmp_path / "pipe")).pipe
    stock.set_progress_bar_config(disable=True)
    sound = stock(tiny.PROMPT, generator=torch.Generator().manual_seed(seed), output_type="np", **call).audio[0]
    with av.open(str(out / "winner.mp4")) as container:
        track = container.streams.audio[0]
        assert (track.rate, track.channels, container.streams.video[0].average_rate) == (16000, 2, 24)
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(track)], 1)
    assert heard.shape[1] >= sound.shape[1]
    assert np.corrcoef(heard[:, : sound.shape[1]].ravel(), sound.numpy().ravel())[0, 1] > 0.9


@works(
    "Inputs and outputs",
    "LTX-2 with a prompt that it writes anew, with given sound latents, a stochastic scheduler, or to be tuned",
    "refused",
    "a sentence says why",
)
def test_what_the_sound_forbids_is_refused(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call, judge = built
    for given, said in (
        ({"enable_prompt_enhancement": True}, "enable_prompt_enhancement = True is not supported: the prompt would be"),
        ({"audio_latents": torch.zeros(1, 5, 4)}, "every candidate's sound starts from the noise of its own seed"),
    ):
        with pytest.raises(PrismError, match=said):
            prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, **call, **given)
    with pytest.raises(PrismError, match=r"denoises a sound beside the video.*tune it with its own trainer"):
        target_of(judge.backbone, tiny.PROMPT, call)
    stochastic = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=True)
    monkeypatch.setattr(pipe, "scheduler", stochastic)
    with pytest.raises(PrismError, match="draw noise from torch's global generator"):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, **call)
