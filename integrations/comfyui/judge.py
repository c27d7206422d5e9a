"""A saved judge on a ComfyUI model: what it needs of the model is checked, then it scores tokens read there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism.backbone import Tokens
from prism.backbone.families import FAMILIES
from prism.backbone.family import Family
from prism.errors import PrismError, quoted
from prism.judge import Judge, saved
from prism.judge.checks import trained_range
from prism.judge.head import Member
from prism.judge.scoring import default_levels

from . import self_check
from .families import MATCHES, Match
from .reading import Reader

_ROUNDING = 4e-3  # relative, of a number that was stored in bfloat16


class LoadedJudge:
    """A judge's heads, read from its folder; `reader` puts it onto a model.

    Attributes: `name`; `members`, the heads; `dimensions`; `family`, PRISM's row of facts of its backbone; `match`, the
    classes of that family.

    Args:
        source: a folder that prism train wrote, or a repository's id on the Hub, "user/name".
        beside: a folder in which a relative `source` may lie too (ComfyUI's models/prism).

    Raises:
        PrismError: where the folder holds no judge, or one of a family that ComfyUI's classes are not matched with.
    """

    score_tokens, combined = Judge.score_tokens, Judge.combined

    def __init__(self, source: str, beside: Path | None = None) -> None:
        source = source.strip()
        if beside is not None and source and not Path(source).exists() and (beside / source).is_dir():
            source = str(beside / source)
        if not source:
            raise PrismError("The node PRISM Load Judge has no judge; name a folder that prism train wrote.")
        if beside is not None and "/" not in source and not Path(source).exists():
            raise PrismError(
                f"There is no judge {quoted(source, 80)} in {beside}; copy the folder that prism train wrote there, or "
                "give its whole path."
            )
        self.saved = saved.read(source, None)
        self.name = self.saved.folder.name
        self.members = tuple(Member(tap, head, share) for tap, head, share in self.saved.heads)
        self.dimensions = tuple(self.saved.dimensions)
        self.family, self.match = family_of(self.saved.backbone, str(self.saved.folder))

    def __repr__(self) -> str:
        taps = ", ".join(str(tap) for tap in sorted({member.tap for member in self.members}))
        return f"LoadedJudge({self.name}, {self.family.name}, after block {taps}, {', '.join(self.dimensions)})"

    def reader(self, patcher: Any) -> Reader:
        """The reader of this judge's tokens on a ComfyUI model (a ModelPatcher), after all checks.

        Raises PrismError for a model of another class or size than the judge was trained on, and where `self_check`
        finds that ComfyUI and diffusers compute otherwise.
        """
        module, kind = patcher.get_model_object("diffusion_model"), self.match.kind
        where = f"The judge {self.name} was trained on {self.match.diffusers}"
        if type(module).__name__ != kind:
            raise PrismError(
                f"{where}, which is {kind} in ComfyUI, and this model is {type(module).__name__}; load the model that "
                "the judge was trained on."
            )
        sampling = patcher.get_model_object("model_sampling")
        if not any(base.__name__ == "CONST" for base in type(sampling).__mro__):
            raise PrismError(
                f"The noise levels of this model are those of {type(sampling).__name__} and not of flow matching, "
                "which the judge reads; take the model's own sampling."
            )
        config = patcher.get_model_object("model_config").unet_config
        needs = self.saved.backbone.get("needs")
        needs = needs if isinstance(needs, Mapping) else {}
        for name, was, present in self._differing(needs.get("denoiser"), config):
            raise PrismError(
                f"{where} with {name} {quoted(was, 60)}, and this model has {quoted(present, 60)}; load the model that "
                "the judge was trained on."
            )
        self._check_latents(needs.get("vae"), patcher.get_model_object("latent_format"), where)
        self_check.check(self.match, self.family, type(module), config)
        return Reader(self.match, self.family, module, [member.tap for member in self.members])

    def scores(self, tokens: Tokens) -> Tensor:
        """(B, num_dimensions) float32 on the CPU; higher is better."""
        scores: Tensor = self.score_tokens(tokens)
        return scores.float().cpu()

    def weights(self, rank_by: str) -> dict[str, float]:
        """The weights of dimensions by which candidates are ranked: one alone, or all alike for an empty name.

        Where the judge has no "overall" and that is asked for, all count alike.
        """
        rank_by = rank_by.strip()
        if rank_by in self.dimensions:
            return {rank_by: 1.0}
        if rank_by in ("", "overall"):
            return dict.fromkeys(self.dimensions, 1 / len(self.dimensions))
        raise PrismError(
            f"rank_by is {quoted(rank_by, 60)}, and this judge scores {', '.join(self.dimensions)}; name one of these."
        )

    def default_level(self) -> float:
        """The noise level at which this judge judges finished latents best, by what was saved with it."""
        return float(default_levels(_Described(self))[0])  # type: ignore[arg-type]

    def note_level(self, t: float) -> None:
        """Log that a noise level is outside those that the heads were trained at."""
        low, high = trained_range(self.saved.trained_on)
        if not low - 1 <= t <= high + 1:
            logging.warning(
                "PRISM: the judge %s was trained at t from %g to %g and is asked to score at t = %.0f; do not rely on "
                "its scores there.",
                *(self.name, low, high, t),
            )

    def _differing(self, needs: Any, config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """What the judge needs of its denoiser and a model has otherwise, as (name, then, now)."""
        if not isinstance(needs, Mapping):  # heads of earlier versions
            return []
        ours = self.match.config(config)
        width = ours["num_attention_heads"] * ours["attention_head_dim"]
        present = {
            "blocks": ours["num_layers"] + ours.get("num_single_layers", 0),
            "widths": [width],
            "in_channels": ours["in_channels"],
            "out_channels": ours.get("out_channels"),
        }
        return [
            (name.replace("_", " "), needs[name], value)
            for name, value in present.items()
            if needs.get(name) is not None and value is not None and needs[name] != value
        ]

    def _check_latents(self, needs: Any, latent_format: Any, where: str) -> None:
        """Refuse a model whose latents have other channels, or are scaled otherwise, than those of the judge's VAE."""
        if not isinstance(needs, Mapping):
            return
        channels, present = needs.get("latent_channels"), latent_format.latent_channels
        if channels is not None and channels != present:
            raise PrismError(
                f"{where} on latents of {channels} channels, and this model's have {present}; load the model that the "
                "judge was trained on."
            )
        if not self.match.normalised:  # its VAE does it in ComfyUI
            return
        axes = (1, present, *[1] * latent_format.latent_dimensions)
        for number in (-1.0, 2.0):
            raw = torch.full(axes, number)
            theirs, ours = latent_format.process_in(raw).flatten(), _normalised(raw.flatten(), needs, self.family)
            if not torch.allclose(theirs.float(), ours, rtol=_ROUNDING, atol=_ROUNDING):
                raise PrismError(
                    f"{where} on latents of another scale than those of {type(latent_format).__name__}; load the VAE "
                    "and model that the judge was trained on."
                )


class _Described:
    """What `default_levels` asks of a judge."""

    def __init__(self, judge: LoadedJudge) -> None:
        self.reference, self.evaluation = judge.saved.reference, judge.saved.evaluation
        self.trained_on, self.backbone = judge.saved.trained_on, self
        self.t_range = (0.0, 1000.0)


def family_of(fingerprint: Mapping[str, Any], where: str) -> tuple[Family, Match]:
    """PRISM's family and the matched classes of a judge, by the fingerprint that was saved with it."""
    pipeline = fingerprint.get("pipeline")
    for family in FAMILIES.values():
        for match in MATCHES:
            if pipeline in family.pipelines and family.name in match.families:
                return family, match
    names = ", ".join(name for match in MATCHES for name in match.families)
    raise PrismError(
        f"The judge in {where} was trained on {quoted(pipeline, 60)}, which no class of ComfyUI is matched with yet; "
        f"take one of the families {names}."
    )


def _normalised(raw: Tensor, needs: Mapping[str, Any], family: Family) -> Tensor:
    """A raw latent (C,) as diffusers' pipeline of the family scales it, by what was saved of the judge's VAE."""
    if family.vae_mean_std and needs.get("latents_mean") and needs.get("latents_std"):
        raw = (raw - torch.tensor(needs["latents_mean"])) / torch.tensor(needs["latents_std"])
    if family.vae_shift:
        raw = raw - float(needs.get("shift_factor") or 0.0)
    return raw * (float(needs.get("scaling_factor") or 1.0) if family.vae_factor == "scaling_factor" else 1.0)
