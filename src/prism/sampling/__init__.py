"""N seeds in, one good video out."""

from prism.sampling.best_of_n import BestOfNResult, best_of_n
from prism.sampling.ledger import Ledger, expected_rows
from prism.sampling.ranking import ranking
from prism.sampling.schedule import Schedule

__all__ = ["BestOfNResult", "Ledger", "Schedule", "best_of_n", "expected_rows", "ranking"]
