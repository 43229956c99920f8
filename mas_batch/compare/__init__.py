"""What differs between two runs: job, models, quality, time, and the answers record by record."""

from mas_batch.compare.comparison import Comparison, compare
from mas_batch.compare.table import print_comparison

__all__ = ["Comparison", "compare", "print_comparison"]
