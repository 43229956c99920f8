"""What a run was worth: quality against references, agreement, confidence, cost, scaling."""

from mas_batch.evaluation.calibration import Calibration
from mas_batch.evaluation.evaluate import Evaluation, evaluate
from mas_batch.evaluation.files import write
from mas_batch.evaluation.quality import Verdict
from mas_batch.evaluation.table import print_evaluation

__all__ = ["Calibration", "Evaluation", "Verdict", "evaluate", "print_evaluation", "write"]
