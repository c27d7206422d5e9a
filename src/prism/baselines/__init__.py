"""Other judges behind the same `score`: what the judge on hidden states is compared with."""

from prism.baselines.pixel import PixelJudge, PixelNetwork
from prism.baselines.train import PixelConfig, train_pixel

__all__ = ["PixelConfig", "PixelJudge", "PixelNetwork", "train_pixel"]
