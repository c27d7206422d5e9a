"""A teacher on decoded noisy latents: it sees what the VAE decodes, is measured as any judge, and may be at a loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests import stores, tiny
from tests.teachers import small_models

from prism import teachers
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.evaluation import measure
from prism.lab.pixel import decode
from prism.lab.teacher_judge import TeacherJudge
from prism.teachers.unifiedreward import UnifiedReward
from prism.teachers.videoscore2 import VideoScore2

PROMPTS = [tiny.PROMPT, tiny.OTHER_PROMPT, tiny.PROMPT]


class Brightness:
    """A teacher of plain arithmetic, at a loss for dark videos."""

    name, dimensions, lowest = "brightness", ("bright", "calm"), -7.0

    def score(self, videos, prompts, fps=None):
        assert fps == 8.0
        rows = []
        for video in videos:
            bright = float(video.mean())
            calm = -float(np.abs(np.diff(video.astype(float), axis=0)).mean())
            rows.append(
                {"bright": bright, "calm": calm} if bright > self.dark else dict.fromkeys(self.dimensions, math.nan)
            )
        return rows

    dark = 0.0


@pytest.fixture(scope="module")
def backbone():
    pipe = tiny.wan()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.mul_(10)
    return Backbone(pipe)


def latents(rows=3):
    return torch.randn(rows, *stores.SHAPE, generator=torch.Generator().manual_seed(3))


def test_it_gives_the_teachers_verdict_on_what_the_vae_decodes(backbone, tmp_path):
    small_models.imagereward(tmp_path, ["a", "red", "cat"])
    teacher = teachers.load(f"imagereward={tmp_path},count=2,device=cpu")
    judge = TeacherJudge(backbone, teacher, {"overall": "preference"})
    videos = [video.numpy() for video in decode(backbone, latents())]
    expected = [[row["preference"]] for row in teacher.score(videos, PROMPTS)]
    scores = judge.score(latents(), PROMPTS, 700)
    assert scores.tolist() == torch.tensor(expected, dtype=torch.float32).tolist()
    assert judge.dimensions == ("overall",)
    assert judge.score_clean(latents(), PROMPTS, t=700, num_draws=2)[0].shape == (3, 1)


def test_dimensions_are_added_and_a_loss_is_the_lowest(backbone):
    teacher = Brightness()
    judge = TeacherJudge(backbone, teacher, {"VQ": "bright", "MQ": ("bright", "calm")}, fps=8.0)
    rows = teacher.score([video.numpy() for video in decode(backbone, latents())], PROMPTS, 8.0)
    expected = torch.tensor([[row["bright"], row["bright"] + row["calm"]] for row in rows])
    torch.testing.assert_close(judge.score(latents(), PROMPTS, 0), expected)
    assert judge.unread == 0
    teacher.dark = sorted(row["bright"] for row in rows)[0]  # one of them is as dark
    scores = judge.score(latents(), PROMPTS, 0)
    assert judge.unread == 1
    assert scores[int(expected[:, 0].argmin())].tolist() == [-7.0, -14.0]
    assert (VideoScore2.lowest, UnifiedReward.lowest) == (0.0, 1.0)


def test_it_is_measured_at_table_1s_noise_levels(backbone, tmp_path):
    store = stores.make(tmp_path / "store", prompts=(2, 2, 3), per_prompt=2)
    judge = TeacherJudge(backbone, Brightness(), dict.fromkeys(store.dimensions[:1], "bright"), fps=8.0)
    rows = measure(judge, store, "test", [989, 0], progress=False).rows
    assert [(row["judge"], row["t"], row["source"]) for row in rows] == [
        ("brightness", 989, "published"),
        ("brightness", 0, "published"),
    ]


def test_a_dimension_that_the_teacher_lacks_is_refused(backbone):
    with pytest.raises(PrismError, match="teacher brightness does not give; it gives bright, calm"):
        TeacherJudge(backbone, Brightness(), {"VQ": ("bright", "sharp")})
    judge = TeacherJudge(backbone, Brightness(), fps=8.0)
    with pytest.raises(PrismError, match="a prompt for each latent; found 2 for 3"):
        judge.score(latents(), PROMPTS[:2], 0)
    with pytest.raises(PrismError, match="Row 1 has no finite score"):
        judge.score(latents().index_fill_(0, torch.tensor([1]), math.nan), PROMPTS, 0)
