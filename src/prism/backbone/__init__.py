"""Read a frozen generator: pipelines, families, conditionings, tokens."""

from prism.backbone.backbone import Backbone
from prism.backbone.conditioning import Conditioning, Ragged
from prism.backbone.families import FAMILIES
from prism.backbone.family import Family
from prism.backbone.noise import OwnClock
from prism.backbone.opensora import OPEN_SORA, OpenSoraPipeline
from prism.backbone.pipeline import Pipeline
from prism.backbone.registry import register
from prism.backbone.taps import Tokens

__all__ = ["FAMILIES", "OPEN_SORA", "Backbone", "Conditioning", "Family"]
__all__ += ["OpenSoraPipeline", "OwnClock", "Pipeline", "Ragged", "Tokens", "register"]
