"""Which accelerators of this machine each embedded worker gets: pure."""

from __future__ import annotations

from collections.abc import Sequence

from mas_batch.agents.spec import replica_name
from mas_batch.errors import JobError
from mas_batch.job import GPU, Job

_ROUNDING = 1e-9
"""Three thirds are one device."""


def assign_devices(job: Job, devices: Sequence[str]) -> dict[str, str]:
    """Return worker name → value of `CUDA_VISIBLE_DEVICES`, for replicas that ask for a GPU.

    A whole number gets so many devices to itself; fractions share a device up to a sum of 1.
    The greatest are placed first, each on the first device with room, so that small ones fill
    what is left.

    Args:
        devices: ids of the machine's devices; none: they are not known, and nothing is assigned.

    Raises:
        JobError: the replicas that the job allows (`max_count`) ask for more devices than there
            are.
    """
    if not devices:
        return {}
    free = dict.fromkeys(devices, 1.0)
    assigned: dict[str, str] = {}
    asking = [(agent.resources.get(GPU, 0.0), i) for i, agent in enumerate(job.agents)]
    for amount, i in sorted(asking, key=lambda each: -each[0]):
        agent = job.agents[i]
        for replica in range(agent.most if amount else 0):
            share, needed = min(amount, 1.0), max(1, round(amount))
            room = [device for device, left in free.items() if left >= share - _ROUNDING]
            if len(room) < needed:
                raise JobError(
                    f"{amount:g} for each of {agent.most} replicas, beside what other agents ask "
                    f"for, is more than this machine has: {len(devices)}; allowed: fewer replicas, "
                    "or fractions below 1, which share a device",
                    key=f"agents.{i}.resources.{GPU}",
                )
            for device in room[:needed]:
                free[device] -= share
            assigned[replica_name(agent.name, replica)] = ",".join(room[:needed])
    return assigned
