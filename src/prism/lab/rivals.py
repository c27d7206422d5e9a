"""Related judges on the bench: their heads trained on the pairs and batches of the paper's head, and two judges that
need no training, which ask the generator itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prism.backbone import Backbone
from prism.backbone.denoising import Target, output, target_of
from prism.lab.heads import RIVALS, RegisterHead, Rival
from prism.preference import LatentStore, prompt_key
from prism.runs import Clock
from prism.training import TrainConfig
from prism.training.batches import Batches, training_groups
from prism.training.conditionings import Conditionings

LEVELS = (700.0, 500.0, 300.0)
"""Noise levels at which the flow residual is taken."""


class RivalJudge:
    """A rival's head on a backbone, as `prism.evaluation.measure` takes it."""

    eta = 5.0

    def __init__(self, name: str, backbone: Backbone, head: Rival, dimensions: Sequence[str]) -> None:
        self.name, self.backbone, self.head, self.dimensions = name, backbone, head.eval(), tuple(dimensions)
        self.trained_on: dict[str, Any] = {}

    @torch.no_grad()
    def score(self, noisy_latents: Tensor, prompts: Sequence[str], t: float, **call: Any) -> Tensor:
        """(B, num_dimensions) float32 of latents at t."""
        return JointRivalJudge([self]).score(noisy_latents, prompts, t, **call)


class JointRivalJudge:
    """Rivals on one backbone in the passes that one would take; the scores of one stand after those of another."""

    name, eta = "related judges", RivalJudge.eta

    def __init__(self, judges: Sequence[RivalJudge]) -> None:
        self.backbone, self.trained_on = judges[0].backbone, judges[0].trained_on
        self.heads = [judge.head for judge in judges]
        self.dimensions = tuple(f"{k}/{name}" for k, judge in enumerate(judges) for name in judge.dimensions)

    @torch.no_grad()
    def score(self, noisy_latents: Tensor, prompts: Sequence[str], t: float, **call: Any) -> Tensor:
        """(B, scores) float32 of latents at t."""
        conditioning = self.backbone.condition(list(prompts), **call)
        levels = torch.full((len(noisy_latents),), float(t))
        every = utilities(self.heads, self.backbone, noisy_latents, conditioning, levels)
        return torch.cat([scores.float() for scores, _ in every], 1)


def utilities(
    heads: Sequence[Rival], backbone: Backbone, noisy: Tensor, conditioning: Any, t: Tensor
) -> list[tuple[Tensor, Tensor | None]]:
    """Each head's utilities and log-variances of latents (B, ...) at t (B,); one pass feeds all but registers."""
    sigma = backbone.family.level(backbone.pipe.scheduler, t)[1].float()
    plain = [head for head in heads if not isinstance(head, RegisterHead)]
    results: dict[int, tuple[Tensor, Tensor | None]] = {}
    if plain:
        tokens = backbone.tokens(noisy, conditioning, t, sorted({tap for head in plain for tap in head.taps}))
        results |= {id(head): head(tokens, sigma) for head in plain}
    for head in heads:
        if isinstance(head, RegisterHead):
            with head.inside(backbone):
                tokens = backbone.tokens(noisy, conditioning, t, max(head.taps), grad=torch.is_grad_enabled())
            results[id(head)] = head(tokens, sigma)
    return [results[id(head)] for head in heads]


def taps_of(backbone: Backbone, tap: int) -> tuple[int, ...]:
    """A third, two thirds and all of the way to the tap: three blocks, as DiNa-LRM's and the registers' are."""
    return tuple(sorted({max(1, round(tap * part / 3)) for part in (1, 2, 3)}))


def train_rivals(
    names: Sequence[str], backbone: Backbone, store: LatentStore, config: TrainConfig, tap: int, dim: int
) -> dict[str, RivalJudge]:
    """Train rivals' heads together, on the batches that `prism.training.train` takes at this seed."""
    taps, dimensions = taps_of(backbone, tap), store.dimensions
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        heads = [RIVALS[name](backbone.widths[tap - 1], dim, len(dimensions), taps) for name in names]
    optimizers = [
        torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        for head in heads
    ]
    groups = training_groups(store, dimensions, config)
    batches, conditionings = Batches(store, groups, backbone, config), Conditionings(backbone, store, groups)
    conditionings.capture()
    clock = Clock("related judges", config.steps, every=60)
    with backbone.freed():
        for step in tqdm(range(config.steps), desc=f"train {', '.join(names)}", disable=None):
            batch = batches.draw(step, range(config.prompts_per_step))
            noisy = batch.noisy_latents.to(backbone.device)
            conditioning = conditionings.of(batch.prompts, batch.kinds[0])
            sigma = backbone.family.level(backbone.pipe.scheduler, batch.t)[1].float()[batch.first]
            read = utilities(heads, backbone, noisy, conditioning, batch.t)
            for head, optimizer, (scores, spread) in zip(heads, optimizers, read):
                spreads = (None, None) if spread is None else (spread[batch.first], spread[batch.second])
                variance = head.variance(sigma, *spreads)
                loss = head.loss(scores[batch.first], scores[batch.second], variance, batch.labels)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(head.parameters(), config.max_gradient_norm)
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate_at(step)
                optimizer.step()
            clock.tick(step + 1, True)
    judges = {name: RivalJudge(name, backbone, head, dimensions) for name, head in zip(names, heads)}
    for judge in judges.values():
        judge.trained_on = {"source": config.source, "seed": config.seed,
                            "prompt_keys": sorted({prompt_key(group.prompt) for group in groups})}  # fmt: skip
    return judges


class OwnError:
    """A judge without training: minus the generator's flow residual at its own prediction (after Proprio, 2605.28230).

    The denoiser predicts the clean latents of z_t; these are noised again to some levels, with the same noise for all,
    and the generator is asked for that noise: how far it misses it says how far the video is from what it would make.
    Proprio disturbs finished videos, weighs levels by their inverse variance and masks motion; here levels count alike.
    """

    title = "flow residual (Proprio)"
    name, eta = "flow residual", 5.0

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.dimensions = backbone, ("overall",)
        self._target: Target | None = None
        self.trained_on: dict[str, Any] = {"source": "untrained"}

    @torch.no_grad()
    def score(self, noisy_latents: Tensor, prompts: Sequence[str], t: float, **call: Any) -> Tensor:
        """(B, 1) float32 of latents at t."""
        conditioning = self.backbone.condition(list(prompts), **call)
        if self._target is None:
            self._target = target_of(self.backbone, prompts[0], call)
        clean = self._predicted(noisy_latents, conditioning, t, self._target) if t else noisy_latents
        noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(0)).to(clean).expand_as(clean)
        total = torch.zeros(len(clean))
        for level in self.levels(float(t)):
            again = self.backbone.add_noise(clean, level, noise)
            back = self._predicted(again, conditioning, level, self._target)
            total -= (back - clean).float().square().flatten(1).mean(1).cpu()
        return total[:, None]

    def levels(self, t: float) -> tuple[float, ...]:
        """The levels to which the prediction at t is noised again."""
        return LEVELS

    def _predicted(self, noisy: Tensor, conditioning: Any, t: float, target: Target) -> Tensor:
        """The clean latents (B, ...) that the denoiser predicts, without guidance."""
        levels = torch.full((len(noisy),), float(t))
        with self.backbone.held(), self.backbone.freed():
            return target.clean(self.backbone, noisy, output(self.backbone, noisy, conditioning, levels), levels)


class OwnDisagreement(OwnError):
    """A judge without training: minus how far two predictions of the clean latents from one step lie apart, that of z_t
    and that of its own prediction, noised again to the same level. One number a step, as cheap as two passes."""

    title = "disagreement at one step"
    name = "disagreement"

    def levels(self, t: float) -> tuple[float, ...]:
        return (t or LEVELS[1],)
