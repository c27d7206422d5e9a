"""Training a head on preference pairs."""

from prism.training.config import TrainConfig as TrainConfig
from prism.training.trainer import train as train
