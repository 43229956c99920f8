"""`since: last`: what the last published run of a job has answered is not asked again.

Before an agent is asked, the earlier run's records are indexed by what they say, the present
corpus is compared with them, and answers of agents that would be asked the same are taken over:

    answers/agent=<name>/part-….parquet   where they are all that the agent would be asked for
    reused/agent=<name>/part-….parquet    else: its worker asks only for the others
    since.json                            what was found; committed last

So an execution that is killed on the way does the rest, and one that is killed later resumes as
any other. Every record stands in the plan, every result is merged anew: what the run publishes
is what a run would that had asked about everything.
"""

from __future__ import annotations

from mas_batch.incremental.identity import asked_as
from mas_batch.incremental.settling import Settling
from mas_batch.incremental.taking import FILE, Present, Since, read_since, take_over

__all__ = ["FILE", "Present", "Settling", "Since", "asked_as", "read_since", "take_over"]
