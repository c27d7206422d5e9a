"""N seeds in, one good video out."""

from prism.sampling.arguments import ranking
from prism.sampling.best_of_n import BestOfNResult, best_of_n
from prism.sampling.edits import edited
from prism.sampling.guidance import Guidance
from prism.sampling.guiding import guided
from prism.sampling.ledger import Ledger
from prism.sampling.listening import StepScores, listen
from prism.sampling.plan import Plan, Schedule
from prism.sampling.racing import Race
from prism.sampling.stopping import Reject, Rejected
from prism.sampling.strategies import STRATEGIES, expected_rows

__all__ = [
    "STRATEGIES",
    "BestOfNResult",
    "Guidance",
    "Ledger",
    "Plan",
    "Race",
    "Reject",
    "Rejected",
    "Schedule",
    "StepScores",
    "best_of_n",
    "edited",
    "expected_rows",
    "guided",
    "listen",
    "ranking",
]
