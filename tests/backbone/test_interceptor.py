"""What stands between a pipeline and its denoiser: wrapping, restoring, gating, recording, replaying."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from tests import tiny
from torch import nn

import prism
from prism.backbone import Backbone
from prism.backbone.denoiser_call import by_name
from prism.backbone.wrapping import around, around_module, state_restored
from prism.sampling.plan import Candidate
from prism.sampling.recording import Recording
from prism.sampling.replay import Interceptor


class Thing:
    def method(self, value: int, generator: Any = None) -> int:
        return value + 1


def test_around_nests_and_restores() -> None:
    thing = Thing()
    double = lambda inner, *args: 2 * inner(*args)  # noqa: E731
    with pytest.raises(KeyboardInterrupt), around(thing, "method", double), around(thing, "method", double):
        assert thing.method(1) == 8
        assert "generator" in inspect.signature(thing.method).parameters  # pipelines look for it
        raise KeyboardInterrupt
    assert vars(thing) == {}
    thing.method = lambda value: 10 * value  # type: ignore[method-assign,assignment,misc]
    own = thing.method
    with around(thing, "method", double):
        assert thing.method(1) == 20
    assert thing.method is own


def test_around_module_stands_outside_hooks_and_restores() -> None:
    layer, seen = nn.Linear(2, 2), []
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    x = torch.ones(1, 2)
    with (
        pytest.raises(RuntimeError),
        around_module(layer, lambda inner, value: seen.append("around") or inner(value) + 1),
    ):
        assert torch.equal(layer(x), layer.forward(x) + 1)
        assert seen == ["around", "hook"]
        raise RuntimeError
    assert "_compiled_call_impl" not in vars(layer)
    with around_module(layer, lambda inner, value: "answered"):
        assert layer(x) == "answered"
    assert seen == ["around", "hook"]


def test_positional_arguments_get_their_names() -> None:
    transformer = tiny.wan().transformer
    latents, timestep, text = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    found = by_name(transformer, (latents, timestep), {"encoder_hidden_states": text, "return_dict": False})
    assert list(found) == ["hidden_states", "timestep", "encoder_hidden_states", "return_dict"]
    assert found["timestep"] is timestep


def test_state_restored_on_the_way_out() -> None:
    pipe = tiny.wan("unipc")
    pipe(tiny.PROMPT, **{**tiny.CALL_WAN, "output_type": "latent"})
    scheduler, guidance, bars = dict(vars(pipe.scheduler)), pipe._guidance_scale, pipe._progress_bar_config
    with pytest.raises(KeyboardInterrupt), state_restored(pipe):
        assert pipe._progress_bar_config["disable"] is True
        pipe._guidance_scale, pipe._made_up = 1.0, 3
        pipe.scheduler.set_timesteps(3)
        pipe.scheduler.made_up = 4
        raise KeyboardInterrupt
    assert vars(pipe.scheduler) == scheduler
    assert (pipe._guidance_scale, pipe._progress_bar_config) == (guidance, bars)
    assert not hasattr(pipe, "_made_up")


@pytest.mark.parametrize("build", [tiny.wan, tiny.cogvideox])
def test_a_recording_answers_the_whole_call(build: Any) -> None:
    """Recorded once, a call is given again without the denoiser; recorded in part, from there on with it."""
    backbone = Backbone(build())
    call = {**(tiny.CALL_WAN if build is tiny.wan else tiny.CALL_COGVIDEOX), "output_type": "latent"}
    ran: list[int] = []
    handle = backbone.denoiser.register_forward_pre_hook(lambda *_: ran.append(1))
    only = Candidate(0, 5)

    def run(recordings: dict[Candidate, Recording], record: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return Interceptor(backbone, [only], recordings, record).run(
            {**call, "prompt": tiny.PROMPT, "generator": generator}
        )[0]

    try:
        recordings = {only: Recording()}
        first = run(recordings, record=True)
        calls = len(ran)
        assert torch.equal(run(recordings, record=False), first)
        assert len(ran) == calls == len(recordings[only])
        half = Recording()
        for inputs, output in [pair for pairs in recordings[only]._outputs.values() for pair in pairs][: calls // 2]:
            half.keep(inputs, output)
        assert torch.equal(run({only: half}, record=False), first)
        assert len(ran) == calls + calls // 2
    finally:
        handle.remove()


def test_offloaded_weights() -> None:
    """accelerate's hooks, which replace `forward`, stay inside; answered calls move no weights."""
    pipe = tiny.wan("unipc")
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    arguments: dict[str, Any] = {"n": 3, "schedule": [(2, 2), (4, 1)], "batch_size": 1, "output_type": "latent"}
    plain = prism.best_of_n(pipe, judge, tiny.PROMPT, **arguments, **tiny.CALL_WAN)
    cpu_offload(pipe.transformer, execution_device="cpu")
    offloaded = prism.best_of_n(pipe, judge, tiny.PROMPT, **arguments, **tiny.CALL_WAN)
    assert next(pipe.transformer.parameters()).is_meta
    assert torch.equal(offloaded.latents, plain.latents)
    assert offloaded.scores == plain.scores
