"""The cluster a run works on: embedded on this machine, or the user's own."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET
from typing import Any

import dask
import psutil
from dask.system import CPU_COUNT
from dask.utils import parse_bytes
from distributed import (
    Client,
    LocalCluster,
    Nanny,
    Scheduler,
    Security,
    SpecCluster,
    WorkerPlugin,
    get_client,
)
from distributed.diagnostics import nvml
from distributed.system import MEMORY_LIMIT

from mas_batch import dask_compat
from mas_batch.agents.devices import assign_devices
from mas_batch.agents.host import EngineHost
from mas_batch.agents.posts import Post, check_served, place, posts_of
from mas_batch.agents.spec import AgentSpec, worker_options
from mas_batch.errors import JobError, RunError
from mas_batch.job import Cluster, Job
from mas_batch.routing.hosting import cluster_workers
from mas_batch.routing.scaling import Scaler
from mas_batch.safe_text import has_credentials, without_pieces
from mas_batch.scratch import scratch_folder

logger = logging.getLogger(__name__)

_TLS_KEYS = ("tls_ca_file", "tls_cert", "tls_key")
_BROADCAST_S = 60.0
_PARTITIONS_IN_PROCESS = 64
_EMBEDDED_START_S = 120.0
_NANNY_PATIENCE_S = 5.0
"""A nanny starts the next process within milliseconds of the end of the last."""


def is_embedded(cluster: Cluster, client: Client | None) -> bool:
    """Whether a run with these settings starts its own cluster."""
    return client is None and not cluster.scheduler and not cluster.scheduler_file


def check_settings(cluster: Cluster) -> None:
    """Find what is wrong with the settings without connecting.

    Raises:
        JobError: a file that they name is not there, or a setting is wrong or missing.
    """
    if cluster.scheduler and "@" in cluster.scheduler:  # what stands before it may be a password
        raise JobError(
            "Dask's addresses have no user and no password; allowed: tcp://host:port, "
            "tls://host:port (not shown: it may be a secret)",
            key="cluster.scheduler",
        )
    for key in ("scheduler_file", *_TLS_KEYS):
        file = getattr(cluster, key)
        if file and not Path(file).is_file():
            raise JobError(f"{file!r} is not a file", key=f"cluster.{key}")
    tls = [key for key in _TLS_KEYS if getattr(cluster, key)]
    if missing := [key for key in _TLS_KEYS if tls and key not in tls]:
        raise JobError(f"is needed too, beside {', '.join(tls)}", key=f"cluster.{missing[0]}")
    if cluster.dashboard_address is not None:
        _free_address(cluster.dashboard_address)
    if cluster.memory_limit != "auto":
        try:
            parse_bytes(cluster.memory_limit)
        except ValueError:
            raise JobError(
                f"{cluster.memory_limit!r} is not an amount of memory; "
                "allowed: auto, 0 (no limit), or a size such as 8GiB",
                key="cluster.memory_limit",
            ) from None


@dataclass(frozen=True, slots=True)
class Connection:
    """A cluster whose workers can host every agent of the job."""

    client: Client
    scaler: Scaler | None
    """Starts and ends workers; None: their number is not ours to change."""


class EmbeddedScaler:
    """Starts and ends the embedded cluster's workers, each of its post's kind."""

    def __init__(
        self, cluster: SpecCluster, workers: Mapping[str, Any], posts: Sequence[Post]
    ) -> None:
        self._cluster = cluster
        self._workers = workers
        self._posts = {post.name: post for post in posts}
        self._dead_since: dict[str, float] = {}

    def scale(self, wanted: Mapping[str, int], retire: Collection[str]) -> None:
        """Have so many hosts per post; see `routing.scaling.Scaler`."""
        running: dict[str, Any] = self._cluster.worker_spec
        for name in [*retire, *self._given_up_by_nannies()]:
            running.pop(name, None)
        for post, num_hosts in wanted.items():
            names = self._posts[post].worker_names
            num_running = sum(name in running for name in names)
            lacking = num_hosts * self._posts[post].size - num_running
            # A name that is still being closed is free again at a later call.
            unused = [n for n in names if n not in running and n not in self._cluster.workers]
            running.update({name: self._workers[name] for name in unused[: max(0, lacking)]})
        # It starts and ends workers until they are as specified; in the background.
        self._cluster.scale(len(running))

    def _given_up_by_nannies(self) -> list[str]:
        """Name workers that are gone for good: a nanny whose worker dies while it is starting it
        never starts it again (seen in distributed 2026.8)."""
        now = time.monotonic()
        dead = [name for name, nanny in self._cluster.workers.items() if not nanny.is_alive()]
        self._dead_since = {name: self._dead_since.get(name, now) for name in dead}
        return [n for n, since in self._dead_since.items() if now - since > _NANNY_PATIENCE_S]


@contextmanager
def connect(
    job: Job,
    specs: Mapping[str, AgentSpec],
    topic: str,
    client: Client | None = None,
    scaler: Scaler | None = None,
) -> Iterator[Connection]:
    """Yield a connection to a cluster whose workers can host every agent of the job.

    A client that was given is never closed. The plugin that hosts the models, named by the
    run's topic, is removed at the end, so a long-lived cluster gets its memory back.

    Raises:
        JobError: an agent needs capabilities that no worker declares.
        RunError: the scheduler cannot be reached.
    """
    with ExitStack() as stack:
        if is_embedded(job.cluster, client):
            client, scaler = stack.enter_context(_embedded(job, specs))
            _host(client, job, topic)
        else:
            if client is None:
                client = stack.enter_context(connect_to_scheduler(job.cluster))
            _host(client, job, topic)
            stack.callback(unregister, client, topic)
        yield Connection(client, scaler)


@contextmanager
def connect_to_merge(
    job: Job, num_partitions: int, client: Client | None = None
) -> Iterator[Connection]:
    """Yield a connection to workers that host no agent: all answers are there.

    Without a scheduler of the user's they are threads of this process; processes where there
    is so much to merge that their start is worth it.

    Raises:
        RunError: the scheduler cannot be reached, or has no worker.
    """
    with ExitStack() as stack:
        if is_embedded(job.cluster, client):
            processes = num_partitions > _PARTITIONS_IN_PROCESS
            client = stack.enter_context(local_workers(processes=processes))
        elif client is None:
            client = stack.enter_context(connect_to_scheduler(job.cluster))
        try:
            client.wait_for_workers(1, timeout=job.cluster.wait_s)
        except TimeoutError as error:
            raise RunError(f"the cluster has no worker to merge the answers: {error}") from error
        yield Connection(client, None)


@contextmanager
def local_workers(*, processes: bool) -> Iterator[Client]:
    """Yield a client of workers on this machine that host no agent: processes, or threads here."""
    with (
        dask.config.set(dask_compat.refuse_other_origins()),
        LocalCluster(
            n_workers=CPU_COUNT if processes else 1,
            threads_per_worker=1 if processes else CPU_COUNT,
            processes=processes,
            dashboard_address=None,
            # Pages for machines are served all the same; by default on every interface.
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
            worker_dashboard_address="127.0.0.1:0",
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def current_client() -> Client | None:
    """Return the client that is active in this process (a notebook's), if there is one."""
    try:
        client = get_client()
    except ValueError:
        return None
    return None if client.asynchronous else client


@contextmanager
def _embedded(job: Job, specs: Mapping[str, AgentSpec]) -> Iterator[tuple[Client, Scaler]]:
    with scratch_folder() as scratch:
        options = worker_options(
            job,
            specs,
            memory_bytes=MEMORY_LIMIT,
            devices=assign_devices(job, _devices()),
            local_directory=str(scratch),
        )
        address = job.cluster.dashboard_address
        security = _security(job.cluster)
        comms = {"security": security, "protocol": "tls://"} if security else {}
        scheduler = {
            "cls": Scheduler,
            "options": {
                "host": "127.0.0.1",
                "dashboard": address is not None,
                "dashboard_address": _free_address(address or "127.0.0.1:0"),
                **_preloads("scheduler", "mas_batch.monitor.preload"),
                **comms,
            },
        }
        common = {**comms, **_preloads("worker", "mas_batch.agents.preload")}
        possible = {n: {"cls": Nanny, "options": {**each, **common}} for n, each in options.items()}
        posts = posts_of(job)
        started = [name for p in posts for name in p.worker_names[: p.wanted * p.size]]
        workers = {name: possible[name] for name in started}
        with (
            dask.config.set(
                {
                    "distributed.nanny.pre-spawn-environ": _keep_freed_memory(),
                    **_rare_looks(),
                    **_child_processes(job),
                    **dask_compat.refuse_other_origins(),
                }
            ),
            SpecCluster(
                workers=workers,
                scheduler=scheduler,
                security=security,
                name="mas-batch",
                silence_logs=logging.ERROR,
            ) as cluster,
            Client(cluster) as client,
        ):
            dask_compat.allow_origins(cluster.scheduler, _own_hosts(address or ""))
            try:
                client.wait_for_workers(len(workers), timeout=_EMBEDDED_START_S)
            except TimeoutError as error:
                raise RunError(f"the embedded workers did not start: {error}") from error
            yield client, EmbeddedScaler(cluster, possible, posts)


def _child_processes(job: Job) -> dict[str, Any]:
    """Let workers have child processes where a model needs one for each of its parts."""
    needed = any(agent.parallel.tensor > 1 for agent in job.agents)
    return {"distributed.worker.daemon": False} if needed else {}


@contextmanager
def connect_to_scheduler(cluster: Cluster) -> Iterator[Client]:
    """Yield a client of the scheduler that the settings name.

    Raises:
        JobError: it is no address, the encryption does not fit it, or as `check_settings`.
        RunError: the scheduler cannot be reached.
    """
    check_settings(cluster)
    where = str(cluster.scheduler or cluster.scheduler_file)
    try:
        client = Client(
            address=cluster.scheduler,
            scheduler_file=cluster.scheduler_file,
            security=_security(cluster),
            set_as_default=False,  # one that fails to connect would stay the current one
        )
    except (TypeError, ValueError, RuntimeError, OSError, TimeoutError) as error:
        said = without_pieces(str(error), where)  # Dask quotes the address, whole or in pieces
        cause = None if has_credentials(where) else error
        if isinstance(error, OSError):  # a time-out is one, too
            raise RunError(f"the scheduler at {where} cannot be reached: {said}") from cause
        raise JobError(f"{where!r}: {said}", key="cluster.scheduler") from cause
    with client:
        yield client


def _security(cluster: Cluster) -> Security | None:
    """Return how to encrypt; None: as Dask's own configuration says (`distributed.comm`)."""
    if not cluster.tls_ca_file:
        return None
    roles = {
        f"tls_{role}_{part}": getattr(cluster, f"tls_{part}")
        for role in ("client", "scheduler", "worker")
        for part in ("cert", "key")
    }
    return Security(tls_ca_file=cluster.tls_ca_file, require_encryption=True, **roles)


def _host(client: Client, job: Job, topic: str) -> None:
    """Check that every agent has a capable worker, then make the workers able to host models."""
    _wait_for_capable_workers(client, job)
    register(client, EngineHost(topic))


def register(client: Client, plugin: WorkerPlugin) -> None:
    """Put a plugin on every worker.

    Raises:
        RunError: not all of them have answered in time.
    """
    if not _ended(client.register_plugin, plugin, within_s=_BROADCAST_S):
        raise RunError(f"not every worker of the cluster has answered within {_BROADCAST_S:g} s")


def unregister(client: Client, plugin: str) -> None:
    """Take a plugin away from every worker that answers, if the client is still connected."""
    if client.status == "running" and not _ended(
        client.unregister_worker_plugin, plugin, within_s=_BROADCAST_S
    ):
        logger.warning("a worker does not answer: its model stays in memory until it ends")


def _ended(call: Callable[..., object], *args: object, within_s: float) -> bool:
    """Make a call that asks every worker: one that is stopped or hangs would block it for ever.

    Returns:
        Whether it ended in time; its exception is raised here.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call(*args)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="mas-batch-broadcast")
    thread.start()
    thread.join(within_s)
    if errors:
        raise errors[0]
    return not thread.is_alive()


def _wait_for_capable_workers(client: Client, job: Job) -> None:
    deadline = time.monotonic() + job.cluster.wait_s
    posts, logged = posts_of(job), ""
    while True:
        workers = cluster_workers(client)
        try:
            check_served(workers, posts, place(workers, posts), job)
        except JobError as error:
            if time.monotonic() >= deadline:
                raise
            if logged != (logged := str(error)):  # a scheduled cluster may take an hour to come
                logger.info("waiting for workers: %s", error)
            time.sleep(0.5)
        else:
            return


def _preloads(process: str, module: str) -> dict[str, list[Any]]:
    """Add a module to Dask's configured preloads of a kind of process, which options replace."""
    names = dask.config.get(f"distributed.{process}.preload")
    names = [names] if isinstance(names, str) else list(names)
    argv = list(dask.config.get(f"distributed.{process}.preload-argv"))
    if not argv or isinstance(argv[0], str):  # then Dask passes the same ones to each
        argv = [argv] * len(names)
    return {"preload": [*names, module], "preload_argv": [*argv, []]}


def _keep_freed_memory() -> dict[str, object]:
    """Return Dask's environment of new workers without its malloc setting.

    It has glibc return memory at every free. A model frees large tensors at every step and
    would get them back by page faults: measured a fifth of the CPU time, as system time.
    """
    environ = dict(dask.config.get("distributed.nanny.pre-spawn-environ"))
    environ.pop("MALLOC_TRIM_THRESHOLD_", None)
    return environ


def _rare_looks() -> dict[str, str]:
    """Return how often Dask's processes look at themselves, unless somebody has said how often.

    Its defaults, 100 looks per second at the stacks and 50 at the event loop, took 4 % of two
    cores, and an engine whose threads wait for each other lost twice that.
    """
    defaults = {
        "distributed.worker.profile.interval": "10ms",
        "distributed.admin.tick.interval": "20ms",
    }
    return {key: "500ms" for key, default in defaults.items() if dask.config.get(key) == default}


def _own_hosts(address: str) -> set[str]:
    """Return the names under which browsers find a dashboard at this address."""
    host = address.rpartition(":")[0]
    names = {"127.0.0.1", "localhost", "[::1]"}
    if host in {*names, "::1"}:
        return names
    interfaces = psutil.net_if_addrs().values()
    numbers = {each.address for found in interfaces for each in found if each.family == AF_INET}
    return {*names, *numbers, socket.gethostname(), socket.getfqdn(), host} - {""}


def _free_address(address: str) -> str:
    """Return the address, or its host with any free port when the port is taken.

    Dask does the same, but with a warning that frightens people who run two jobs at once.
    """
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "0.0.0.0", int(port)))
        except OSError:
            return f"{host}:0"
        except (ValueError, OverflowError):
            raise JobError(
                f"{address!r} is not host:port", key="cluster.dashboard_address"
            ) from None
    return address


def _devices() -> list[str]:
    """Name the accelerators that this process may use, as `CUDA_VISIBLE_DEVICES` does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip()]
    try:
        return [str(number) for number in range(nvml.device_get_count())]
    except Exception:  # no driver, no pynvml: no GPU that we could assign
        return []
