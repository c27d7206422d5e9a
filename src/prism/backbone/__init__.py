"""Reading a frozen generator."""

from prism.backbone.backbone import Backbone
from prism.backbone.clocks import OwnClock
from prism.backbone.conditioning import Conditioning, Ragged, Tokens
from prism.backbone.families import FAMILIES
from prism.backbone.family import Family
from prism.backbone.interceptor import Interceptor
from prism.backbone.opensora import OPEN_SORA, OpenSoraPipeline
from prism.backbone.protocol import Pipeline
from prism.backbone.recording import Recording
from prism.backbone.registry import register

__all__ = ["FAMILIES", "OPEN_SORA", "Backbone", "Conditioning", "Family", "Interceptor"]
__all__ += ["OpenSoraPipeline", "OwnClock", "Pipeline", "Ragged", "Recording", "Tokens", "register"]
