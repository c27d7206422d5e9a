"""Other judges behind the same `score`: what the judge on hidden states is compared with."""

from prism.baselines.frames import DecodedCache
from prism.baselines.network import PixelNetwork
from prism.baselines.pixel import PixelJudge
from prism.baselines.train import PixelConfig, train_pixel

__all__ = ["DecodedCache", "PixelConfig", "PixelJudge", "PixelNetwork", "train_pixel"]
