"""What a row of facts can say of a model of one's own, each on a tiny pipeline that needs it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from tests import tiny
from tests.works import works
from tests.zoo import VARIANTS
from tests.zoo.odd import ODD, ClockPipeline, JoinedPipeline, SoundPipeline, TuplePipeline, odd
from tests.zoo.wan_to_kandinsky import _image

import prism
from prism.backbone import Backbone
from prism.backbone.denoiser_call import DenoiserCall
from prism.commands import checks
from prism.commands.subject import Subject
from prism.errors import PrismError
from prism.judge import Judge


@works(
    "Families of one's own",
    "text tokens beside the video's, rows in dictionaries, a clock or latent layout of its own, one text a call, a VAE "
    "without a distribution, sound beside the video",
    "exact",
    "Each is a fact of prism.backbone.Family; prism doctor --family checks it.",
)
@pytest.mark.parametrize("oddity", ODD)
def test_every_check_holds_for(oddity: str) -> None:
    pipe, call = odd(ODD[oddity])
    subject = Subject(Backbone(pipe), call, (tiny.PROMPT, tiny.OTHER_PROMPT))
    lines = {name: (holds, told) for name, holds, told in checks.run_all(subject)}
    skipped = {"inside and outside"} if oddity == "sound beside the video" else set()  # outside the sound is noise
    assert [(name, told) for name, (holds, told) in lines.items() if not holds and name not in skipped] == []


@works(
    "Families of one's own",
    "a row that does not say what stands beside the video's tokens",
    "refused",
    "The sentence names the facts.",
)
def test_tokens_that_are_not_the_videos_are_not_scored_as_such() -> None:
    """The text's 24 behind and a global one before were read as video: 43 tokens on a grid of 18."""
    pipe, call = odd(JoinedPipeline)
    pipe.family = replace(pipe.family, tokens_before=0, tokens_behind=0)
    judge = Judge.untrained(pipe, dim=16)
    with pytest.raises(PrismError, match=r"gives 43 tokens, and the video has 3 x 2 x 3 = 18; .*tokens_before") as said:
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, **call)
    assert len(str(said.value)) < 500
    pipe.family = replace(pipe.family, tokens_before=1, tokens_behind=lambda arguments: arguments["words"].shape[1])
    assert prism.best_of_n(pipe, Judge.untrained(pipe, dim=16), tiny.PROMPT, n=2, **call).video is not None


def test_the_winners_output_is_all_that_the_pipeline_gave() -> None:
    pipe, call = VARIANTS["wan21_t2v_euler"]()
    found = prism.best_of_n(pipe, None, tiny.PROMPT, n=1, strategy="none", output_type="np", **call)
    assert type(found.output).__name__ == "WanPipelineOutput"
    assert found.output is found.top[0].output
    assert (found.video == found.output.frames[0]).all()


def test_a_sound_beside_the_video_is_sampled_recorded_and_cut_with_it() -> None:
    pipe, call = odd(SoundPipeline)
    judge = Judge.untrained(pipe, dim=16)
    for size in (1, 3):
        for strategy in ("early", "full"):
            found = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, batch_size=size, strategy=strategy, **call)
            alone = pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(found.seed), **call)
            torch.testing.assert_close(found.output.sound, alone.sound, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(torch.tensor(found.output.frames), torch.tensor(alone.frames))
            if size == 1:
                assert torch.equal(found.output.sound, alone.sound)
    pipe.family = replace(pipe.family, outputs=3)
    with pytest.raises(PrismError, match=r"The denoiser gives 2 tensors; say in the family how many \(outputs\)"):
        prism.best_of_n(pipe, Judge.untrained(pipe, dim=16), tiny.PROMPT, n=3, **call)


def test_rows_are_taken_in_dictionaries_by_name() -> None:
    family = replace(ClockPipeline.family, batched_arguments=frozenset(["z", "all", "some.rows"]))
    arguments: dict[str, Any] = {
        "z": torch.arange(3.0),
        "all": {"a": torch.arange(3), "b": torch.arange(6), "c": torch.arange(2), "d": {"e": [1, 2, 3]}, "f": 5},
        "some": {"rows": torch.arange(3), "table": torch.arange(3)},
        "none": {"rows": torch.arange(3)},
        "empty": {},
        "odd": {1: torch.arange(3)},
    }
    call = DenoiserCall(arguments, family, {})
    taken = call.rows([2, 0]).arguments
    assert taken["all"]["a"].tolist() == [2, 0]
    assert taken["all"]["b"].tolist() == [4, 5, 0, 1]
    assert taken["all"]["c"].tolist() == [0, 1]
    assert (taken["all"]["d"], taken["all"]["f"], taken["empty"]) == ({"e": [3, 1]}, 5, {})
    assert (taken["some"]["rows"].tolist(), taken["some"]["table"].tolist()) == ([2, 0], [0, 1, 2])
    assert taken["none"]["rows"].tolist() == taken["odd"][1].tolist() == [0, 1, 2]
    assert call.has_rows("all", arguments["all"])
    assert not call.has_rows("none", arguments["none"])


def test_a_vae_that_gives_no_latents_is_named() -> None:
    pipe, _ = odd(TuplePipeline)
    pipe.vae.encode = lambda x: {"z": x}
    with pytest.raises(PrismError, match=r"Tuples.encode gives dict; latents are needed, themselves, first in a tuple"):
        Backbone(pipe).encode(torch.zeros(1, 3, 32, 48, 3))


@works("Inputs and outputs", "a VAE that takes one video at a time (HunyuanVideo 1.5)", "to rounding", "Rows in turn.")
def test_a_vae_that_takes_one_video_at_a_time_is_given_one() -> None:
    """An oracle over a batch, and `encode` and `decode` of two, raised a RuntimeError."""
    pipe, call = VARIANTS["hunyuan15"]()
    backbone = Backbone(pipe)
    options: dict[str, Any] = {"n": 2, "strategy": "oracle", "oracle": lambda video, _: float(video.mean()), **call}
    many = prism.best_of_n(pipe, None, tiny.PROMPT, batch_size=2, output_type="np", **options)
    ones = prism.best_of_n(pipe, None, tiny.PROMPT, batch_size=1, output_type="np", **options)
    assert many.seed == ones.seed
    assert many.scores[0]["scores"]["oracle"] == pytest.approx(ones.scores[0]["scores"]["oracle"], abs=1e-4)
    two = torch.cat([ones.latents, many.latents * 0.5])
    videos = backbone.decode(two)
    torch.testing.assert_close(videos[:1], backbone.decode(ones.latents))
    torch.testing.assert_close(backbone.encode(videos)[1:], backbone.encode(videos[1:]))


SHIFTED = {"sd3": True, "flux": True, "wan21_t2v_euler": False, "kandinsky5_t2v": False, "hunyuan": False}


@pytest.mark.parametrize("variant", SHIFTED)
def test_a_shift_factor_is_applied_where_the_pipeline_applies_it(variant: str) -> None:
    """`shift_factor` of a VAE that has one, as Kandinsky's image models have Flux', was applied to every pipeline's."""
    pipe, call = VARIANTS[variant]()
    pipe.vae.register_to_config(shift_factor=0.25)
    subject = Subject(Backbone(pipe), call, (tiny.PROMPT, tiny.OTHER_PROMPT))
    checks.vae(subject)
    assert subject.backbone.family.vae_shift == SHIFTED[variant]


# Pipelines that begin with a video or an image, of the parts of a variant: further arguments.
BEGUN = {
    "WanVideoToVideoPipeline": ("wan21_t2v_unipc", "video"),
    "CogVideoXVideoToVideoPipeline": ("cogvideox_ddim", "video"),
    "StableDiffusion3Img2ImgPipeline": ("sd3", "image"),
    "FluxImg2ImgPipeline": ("flux", "image"),
    "QwenImageImg2ImgPipeline": ("qwen_image", "image"),
}


@works("Inputs and outputs", "video to video and image to image, with strength", "exact", "In five families.")
@pytest.mark.parametrize("name", BEGUN)
def test_every_check_holds_for_a_run_that_begins_with_a_picture(name: str) -> None:
    variant, what = BEGUN[name]
    pipe, call = VARIANTS[variant]()
    kind = getattr(diffusers, name)
    taken, parts = (inspect.signature(each).parameters for each in (kind.__call__, kind.__init__))
    begun = kind(**{part: value for part, value in pipe.components.items() if part in parts})
    begun.set_progress_bar_config(disable=True)
    image = _image(32, 48)
    call = {**call, what: [image] * 9 if what == "video" else image, "strength": 0.8}
    call = {argument: value for argument, value in call.items() if argument in taken}
    lines = checks.run_all(Subject(Backbone(begun), call, (tiny.PROMPT, tiny.OTHER_PROMPT)))
    assert [(check, told) for check, holds, told in lines if not holds] == []
