"""What a pipeline of sounds gives, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from tests import tiny
from tests.works import works
from tests.zoo.sounds import ace_step, stable_audio, stable_audio_3

import prism
from prism import cli, files
from prism.backbone import Backbone
from prism.backbone.sounds import write_sound
from prism.errors import PrismError
from prism.training.collect import collect
from prism.training.reward import Reward


@pytest.fixture(scope="module")
def built() -> tuple[Any, dict[str, Any], prism.Judge]:
    pipe, call = stable_audio_3()
    return pipe, call, prism.Judge.untrained(pipe, dim=16)


@works(
    "Inputs and outputs",
    "pipelines that make sounds",
    "exact",
    "the winner's waveform in place of its video; `prism sample` writes it as `winner.wav`",
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")  # diffusers' VAE uses torch's old one
def test_sample_writes_the_stock_calls_sound(built: Any, tmp_path: Path, capsys: Any) -> None:
    pipe, call, judge = built
    pipe.save_pretrained(tmp_path / "pipe")
    files.write_json(tmp_path / "pipe" / "call.json", call)
    judge.save_pretrained(tmp_path / "head", trained_on={"store": "none"})
    out = tmp_path / "run"
    models = ["--backbone", str(tmp_path / "pipe"), "--head", str(tmp_path / "head"), "--out", str(out)]
    command = ["sample", "--prompt", tiny.PROMPT, "--n", "2", "--top-k", "2", "--batch-size", "1", *models]
    assert cli.main(command) == 0
    assert f"{out / 'winner.wav'}" in capsys.readouterr().out
    top = json.loads((out / "metrics.json").read_text())["top"]
    assert [row["video"] for row in top] == ["winner.wav", "winner-2.wav"]
    again = Backbone.from_pretrained(str(tmp_path / "pipe")).pipe
    again.set_progress_bar_config(disable=True)
    for row in top:
        generator = torch.Generator().manual_seed(row["seed"])
        stock = again(tiny.PROMPT, generator=generator, output_type="np", **call).audios[0]
        rate, samples = wavfile.read(out / row["video"])
        assert (rate, samples.dtype) == (16, np.float32)
        assert np.array_equal(samples, stock.T)  # (samples, channels) in a file
    assert "seed" in (out / "report.html").read_text()


def test_prompts_read_together_score_as_alone() -> None:
    """Stable Audio gives its denoiser one timestep (1,) for however many rows."""
    pipe, call = stable_audio()
    judge = prism.Judge.untrained(pipe, dim=16)
    latents = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    prompts = [tiny.PROMPT, tiny.OTHER_PROMPT]
    together = judge.score(latents, prompts, 500.0, **call)
    alone = [judge.score(latents[row : row + 1], prompts[row : row + 1], 500.0, **call) for row in (0, 1)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_distilled_ace_step_is_not_guided() -> None:
    """Its call ignores the scale, which is 7 by default."""
    pipe, call = ace_step()
    judge = prism.Judge.untrained(pipe, dim=16)
    run: dict[str, Any] = {"n": 2, "schedule": [(1, 1)], **call, "num_inference_steps": 2, "output_type": "np"}
    rows = []
    for pipe.is_turbo in (False, True):
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, **run)
        rows.append(result.ledger.denoiser_rows)
        steps = judge.backbone.steps({"prompt": tiny.PROMPT, **call, "num_inference_steps": 2})
        assert steps.calls == ((1, 1) if pipe.is_turbo else (2, 2))  # what plans count
    assert rows == pytest.approx([2 / 3 + 2 * 2, 2 / 3 + 2])  # two reads up to the tap, and the winner's steps
    with pytest.raises(PrismError, match=r"cfg_interval_end = 0.5 is not supported: some steps would have more rows"):
        prism.best_of_n(pipe, judge, tiny.PROMPT, cfg_interval_end=0.5, **run)


def test_an_oracle_hears_the_waveform(built: Any) -> None:
    pipe, call, _ = built
    heard: list[Any] = []

    def loudness(sound: Any, prompt: str) -> float:
        heard.append(sound)
        return float(sound.mean())

    result = prism.best_of_n(pipe, None, tiny.PROMPT, n=2, strategy="oracle", oracle=loudness, batch_size=1, **call)
    assert [sound.shape for sound in heard] == [(2, 24), (2, 24)]
    assert result.index == int(np.argmax([sound.mean() for sound in heard]))
    assert repr(result).startswith(f"BestOfNResult(seed {result.seed} of 2 candidates, 2 x 24, ")


@works(
    "Inputs and outputs",
    "what needs pictures (previews, encoded clips, decoded videos, rewards of frames) of sounds",
    "refused",
    "a sentence says that sounds have no frames",
)
def test_what_needs_pictures_is_refused(built: Any, tmp_path: Path) -> None:
    pipe, call, judge = built
    backbone, said = judge.backbone, r"StableAudio3Pipeline makes sounds, which have no frames"
    with pytest.raises(PrismError, match=said):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, look="ahead", schedule=[(2, 1)], previews=True, **call)
    with pytest.raises(PrismError, match=said):
        backbone.decode(torch.zeros(1, 8, 6))
    with pytest.raises(PrismError, match=said):
        backbone.encode(np.zeros((2, 8, 8, 3), np.float32))
    reward = Reward(lambda videos, prompts: [{"bright": 0.0} for _ in videos], "bright")
    with pytest.raises(PrismError, match=said):
        collect([tiny.PROMPT], backbone, call, tmp_path / "store", [reward], candidates=2)


def test_sounds_that_are_none_are_not_written(tmp_path: Path) -> None:
    for sound in (np.full((2, 4), np.nan), np.zeros((1, 2, 4)), np.zeros((2, 0))):
        with pytest.raises(PrismError, match="must be finite numbers"):
            write_sound(tmp_path / "sound.wav", sound, 16)
    assert not (tmp_path / "sound.wav").exists()
