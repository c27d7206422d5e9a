"""Evidence: the agreement of a judge with labels, by noise level, with intervals."""

from prism.evaluation.accuracy import NO_TIES as NO_TIES
from prism.evaluation.accuracy import PairwiseAccuracy as PairwiseAccuracy
from prism.evaluation.accuracy import clustered_bootstrap as clustered_bootstrap
from prism.evaluation.accuracy import pairwise_accuracy as pairwise_accuracy
from prism.evaluation.accuracy import prompt_interval as prompt_interval
from prism.evaluation.evaluator import TIMESTEPS as TIMESTEPS
from prism.evaluation.evaluator import evaluate as evaluate
from prism.evaluation.evaluator import measure as measure
from prism.evaluation.evaluator import score_videos as score_videos
from prism.evaluation.measurement import Measurement as Measurement
from prism.evaluation.measurement import calibrate as calibrate
from prism.evaluation.measurement import compare_judges as compare_judges
