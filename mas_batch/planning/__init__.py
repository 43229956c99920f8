"""Predict a run before it runs: measure a little, learn what tasks take, simulate the whole.

survey.py    one pass over the corpus: partitions of several sizes, a sample of its records
sampling.py  runs the job on the sample, in two sizes of partition
evidence.py  from the ledgers of such runs, or of a former one, to what agents and phases take
machine.py   what other programs take of this machine meanwhile
shares.py    how many records go on to a further agent
rates.py     what tasks and phases take in the planned run
forecast.py  simulates runs with the project's dispatcher: seconds, tokens, who is busy
planner.py   which replicas, sizes and policies would do better, and which meet a deadline
"""

from mas_batch.planning.options import parse_deadline, parse_replicas
from mas_batch.planning.planned import Planned
from mas_batch.planning.planner import plan
from mas_batch.planning.show import print_plan, to_json

__all__ = ["Planned", "parse_deadline", "parse_replicas", "plan", "print_plan", "to_json"]
