"""Predict a run before it runs: measure a little, learn what tasks take, simulate the whole.

survey.py        one pass over the corpus: its partitions' sizes, a sample of its records
sampling.py      runs the job on the sample, in two sizes of partition
measurements.py  from the ledgers of such runs, or of a former one, to what agents and phases take
shares.py        how many records go on to a further agent
service_time.py  fits what a task takes to measured tasks
rates.py         what tasks and phases take in the planned run
forecast.py      simulates the run with the project's dispatcher: seconds, tokens, busy agents
bottleneck.py    what a run waits for most, in words
planner.py       predicts a job's run, other numbers of hosts, and which meet a deadline
prediction.py    what a plan says: plain values
command.py       the command's options, and a plan as a table and as JSON
"""

from mas_batch.planning.command import parse_deadline, parse_hosts, print_plan, to_json
from mas_batch.planning.planner import plan
from mas_batch.planning.prediction import RunPrediction

__all__ = ["RunPrediction", "parse_deadline", "parse_hosts", "plan", "print_plan", "to_json"]
