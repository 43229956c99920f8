"""Why a partition was asked of whom, and what came of it: read from the run's files.

story.py        what one execution's events tell of one partition, step by step (pure)
explanation.py  reads the run's files and puts its executions' stories together
text.py         prints an explanation for people, or makes it JSON
"""

from mas_batch.explain.explanation import Explanation, explain, find_record
from mas_batch.explain.text import print_explanation, to_json

__all__ = ["Explanation", "explain", "find_record", "print_explanation", "to_json"]
