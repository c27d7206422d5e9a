"""A judge as a reward model of Flow-Factory, in the trainer's own process.

Flow-Factory hands over what a model's call names: here the kept latents, their timesteps and the map of which were
kept, so that nothing is decoded. Keys of the reward's entry in its configuration are attributes of `config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prism.errors import PrismError
from prism.judge.trajectory import noise_levels_of
from prism.rewards.loaded import scorer_of
from prism.rewards.scorer import LatentRow

SIZES = ("num_frames", "height", "width", "max_sequence_length")
"""Keys of the configuration that are arguments of the pipeline's call."""


class LatentReward:
    """What `FlowFactoryReward` adds to Flow-Factory's `PointwiseRewardModel`.

    Keys of its entry: head, backbone (folders or ids); `SIZES` and call, the pipeline's arguments, as the trainer
    samples; dimension, draws, levels and seed, as of `prism.rewards.scorer.Scorer`; dtype and device, Flow-Factory's.
    """

    required_fields = ("prompt", "all_latents", "timesteps", "latent_index_map")
    use_tensor_inputs = True
    output: Any = dict
    device: Any
    dtype: Any

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)  # type: ignore[call-arg]  # of the trainer's base class
        settings: dict[str, Any] = {
            name: getattr(config, name, None) for name in ("head", "backbone", "dimension", "draws", "levels")
        }
        for name in ("head", "backbone"):
            if not settings[name]:
                raise PrismError(f"The reward's entry has no {name}; name a folder or an id on the Hub.")
        call = {name: getattr(config, name) for name in SIZES if getattr(config, name, None) is not None}
        self.scorer = scorer_of(
            device=str(self.device),
            dtype=str(self.dtype).rpartition(".")[2],
            call={**call, **(getattr(config, "call", None) or {})},
            seed=getattr(config, "seed", None) or 0,
            **settings,
        )

    def __call__(
        self,
        prompt: Sequence[str],
        all_latents: Sequence[Tensor],
        timesteps: Sequence[Tensor],
        latent_index_map: Sequence[Tensor],
    ) -> Any:
        """The reward of each sample, from the last of its states that was kept.

        A finished one is re-noised to the judge's levels, and its scores averaged; another one is judged as it is, at
        its own noise level.

        Args:
            prompt: B texts.
            all_latents: per sample the kept states, (states, ...).
            timesteps: per sample the denoiser's timesteps, (steps,).
            latent_index_map: per sample, for the noise and for each step, the index of its state, or -1; (steps + 1,).

        Returns:
            Flow-Factory's output, with ``rewards`` (B,).
        """
        counts = [len(prompt), len(all_latents), len(timesteps), len(latent_index_map)]
        if len(set(counts)) > 1:
            raise PrismError(
                "prompt, all_latents, timesteps and latent_index_map hold one entry a sample; found "
                f"{', '.join(map(str, counts))}."
            )
        rewards = [
            self._reward(str(text), states, times, index)
            for text, states, times, index in zip(prompt, all_latents, timesteps, latent_index_map, strict=True)
        ]
        counts = [len(rows) for rows in rewards]
        values = iter(self.scorer([row for rows in rewards for row in rows]))
        means = [sum(self.scorer.reward(next(values)) for _ in range(count)) / count for count in counts]
        return self.output(rewards=torch.tensor(means, dtype=torch.float32))

    def _reward(self, prompt: str, states: Tensor, timesteps: Tensor, index: Tensor) -> list[LatentRow]:
        """The rows whose mean score is a sample's reward."""
        kept = [place for place, position in enumerate(index.tolist()) if position >= 0]
        if not kept or len(states) != len(kept):
            raise PrismError(
                f"Flow-Factory kept {len(states)} states, and latent_index_map names {len(kept)}; a judge needs the "
                "last one at least."
            )
        last = states[int(index[kept[-1]])][None]
        last = last.reshape(self.scorer.fitted(last.shape))
        if kept[-1] == len(index) - 1:
            return [LatentRow(last, level, self.scorer.seed, prompt) for level in self.scorer.levels]
        level = noise_levels_of(self.scorer.judge, timesteps[kept[-1]].reshape(1), 1, 1)
        return [LatentRow(last, float(level), self.scorer.seed, prompt, noisy=True)]


class _Missing:
    """In place of Flow-Factory's base class where it is not installed."""

    def __init__(self, config: Any, accelerator: Any) -> None:
        raise PrismError("FlowFactoryReward is used by Flow-Factory, which is not installed here; start it from there.")


def __getattr__(name: str) -> Any:
    if name != "FlowFactoryReward":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from flow_factory.rewards import PointwiseRewardModel, RewardModelOutput
    except ImportError:
        return type(name, (LatentReward, _Missing), {"__module__": __name__})
    kind = type(name, (LatentReward, PointwiseRewardModel), {"output": RewardModelOutput, "__module__": __name__})
    globals()[name] = kind
    return kind
