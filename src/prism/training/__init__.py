"""Training a head on preference pairs, or several heads on the same batches."""

from prism.training.config import TrainConfig as TrainConfig
from prism.training.trainer import train as train
from prism.training.trainer import train_together as train_together
