"""Which accelerators of this machine each embedded worker gets: pure."""

from __future__ import annotations

from collections.abc import Sequence

from mas_batch.agents.posts import posts_of
from mas_batch.errors import JobError
from mas_batch.job import GPU, Job

_ROUNDING = 1e-9
"""Three thirds are one device."""


def assign_devices(job: Job, devices: Sequence[str]) -> dict[str, str]:
    """Return worker name → value of `CUDA_VISIBLE_DEVICES`, for hosts that ask for a GPU.

    A whole number gets so many devices to itself; fractions share a device up to a sum of 1.
    The greatest are placed first, each on the first device with room, so that small ones fill
    what is left.

    Args:
        devices: ids of the machine's devices; none: they are not known, and nothing is assigned.

    Raises:
        JobError: the hosts that the job allows (`max_count`) ask for more devices than there
            are.
    """
    if not devices:
        return {}
    free = dict.fromkeys(devices, 1.0)
    assigned: dict[str, str] = {}
    for post in sorted(posts_of(job), key=lambda post: -post.needs.get(GPU, 0.0)):
        amount = post.needs.get(GPU, 0.0)
        share, needed = min(amount, 1.0), max(1, round(amount))
        for worker in post.worker_names if amount else ():
            room = [device for device, left in free.items() if left >= share - _ROUNDING]
            if len(room) < needed:
                first = next(i for i, agent in enumerate(job.agents) if agent.name in post.agents)
                raise JobError(
                    f"{amount:g} for each of {post.most} hosts, beside what other agents ask "
                    f"for, is more than this machine has: {len(devices)}; allowed: fewer hosts, "
                    "or fractions below 1, which share a device",
                    key=f"agents.{first}.resources.{GPU}",
                )
            for device in room[:needed]:
                free[device] -= share
            assigned[worker] = ",".join(room[:needed])
    return assigned
