"""What a run was worth: quality against references, agreement, confidence, cost, scaling."""

from mas_batch.aggregate.calibration import Calibration
from mas_batch.evaluation.evaluate import Evaluation, evaluate
from mas_batch.evaluation.scoring import Worth
from mas_batch.evaluation.table import print_evaluation
from mas_batch.evaluation.write import write

__all__ = ["Calibration", "Evaluation", "Worth", "evaluate", "print_evaluation", "write"]
