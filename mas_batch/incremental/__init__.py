"""`since: last`: answers that the last published run of a job has are reused, not asked for again.

Before an agent is asked, the earlier run's records are indexed by their content, the present
corpus is compared with them, and answers of agents that would be asked the same are taken over:

    answers/agent=<name>/part-….parquet   where the agent has answered the whole partition
    reused/agent=<name>/part-….parquet    else: the agent's worker asks only for the missing answers
    since.json                            what was reused; committed last

If an execution is killed before `since.json` is committed, the next one does the rest; if it is
killed later, the run resumes as any other. The plan holds every record and every result is merged
anew, so the run publishes the same as a run that asks about every record.
"""

from __future__ import annotations

from mas_batch.incremental.earlier import last_published
from mas_batch.incremental.identity import asked_as
from mas_batch.incremental.retry import begin_retry, latest_version
from mas_batch.incremental.settling import Settling
from mas_batch.incremental.taking import FILE, Present, Since, read_since, take_over

__all__ = [
    "FILE",
    "Present",
    "Settling",
    "Since",
    "asked_as",
    "begin_retry",
    "last_published",
    "latest_version",
    "read_since",
    "take_over",
]
