"""The judge: a frozen backbone, a tap and a small trained head."""

from prism.judge.head import QueryHead as QueryHead
from prism.judge.judge import Judge as Judge
