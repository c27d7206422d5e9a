"""Evidence: the agreement of a judge with labels, by noise level, with intervals."""

from prism.evaluation.accuracy import NO_TIES as NO_TIES
from prism.evaluation.accuracy import PairwiseAccuracy as PairwiseAccuracy
from prism.evaluation.accuracy import pairwise_accuracy as pairwise_accuracy
from prism.evaluation.biases import bias_rows as bias_rows
from prism.evaluation.biases import swap_test as swap_test
from prism.evaluation.calibration import calibrate as calibrate
from prism.evaluation.calibration import reliability_rows as reliability_rows
from prism.evaluation.comparison import compare_judges as compare_judges
from prism.evaluation.evaluator import TIMESTEPS as TIMESTEPS
from prism.evaluation.evaluator import evaluate as evaluate
from prism.evaluation.evaluator import measure as measure
from prism.evaluation.evaluator import measure_together as measure_together
from prism.evaluation.evaluator import score_videos as score_videos
from prism.evaluation.intervals import clustered_bootstrap as clustered_bootstrap
from prism.evaluation.intervals import prompt_interval as prompt_interval
from prism.evaluation.intervals import video_interval as video_interval
from prism.evaluation.measurement import Measurement as Measurement
from prism.evaluation.summary import accuracy_rows as accuracy_rows
from prism.evaluation.summary import generator_rows as generator_rows
