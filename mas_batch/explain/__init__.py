"""Why a partition was asked of whom, and what came of it: read from the run's files.

story.py        what one execution's events tell of one partition, step by step (pure)
explanation.py  reads the run's files and puts its executions' stories together
"""

from mas_batch.explain.explanation import Explanation, explain, find_record

__all__ = ["Explanation", "explain", "find_record"]
