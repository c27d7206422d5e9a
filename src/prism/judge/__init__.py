"""The judge: a frozen backbone, a tap and a small trained head, or several averaged."""

from prism.judge.head import QueryHead as QueryHead
from prism.judge.judge import Judge as Judge
from prism.judge.judge import Member as Member
