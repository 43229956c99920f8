"""One submitter per run, whatever happens to the process that has it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from mas_batch import pipeline
from mas_batch.errors import JobError, OutputError, RunError, RunLockedError
from mas_batch.job import Job
from mas_batch.run_folder.lock import FOLDER, RunLock
from mas_batch.run_folder.owner import Owner
from mas_batch.run_folder.storage import Store
from tests.chaos import Arena, started
from tests.waiting import PATIENCE_S, wait_until

FOR_EVER = 1000.0
"""A patience in seconds that no test outlasts: what does not wait for it was decided at once."""

SUBMITTER = """
import json, sys
from contextlib import ExitStack
from mas_batch.errors import MasBatchError
from mas_batch.run_folder.lock import RunLock
from mas_batch.run_folder.storage import Store
with ExitStack() as held:
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            match json.loads(line):
                case "check":
                    lock.check()
                case "release":
                    held.close()
                case [url, options, times]:
                    lock = held.enter_context(RunLock(Store(url, options), **times))
            print("ok", flush=True)
        except MasBatchError as error:
            print(error, flush=True)
"""


class Submitter:
    """A process that takes a run's lock when it is told to."""

    def __init__(self, *prefix: str) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", SUBMITTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, command: object) -> str:
        self.tell(command)
        return self.hear()

    def take(self, store: Store, **times: float) -> str:
        return self.ask([store.url, dict(store.options), times])


@contextmanager
def submitters(*prefixes: tuple[str, ...]) -> Iterator[list[Submitter]]:
    """Start processes, one per prefix of its command; at the end kill those that are left."""
    with ExitStack() as stack:
        found = []
        for prefix in prefixes:
            found.append(Submitter(*prefix))
            stack.enter_context(found[-1].process)
            stack.callback(found[-1].process.kill)
        assert [each.hear() for each in found] == ["ready"] * len(found)
        yield found


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "run"))
    return Store("s3://bucket/run", request.getfixturevalue("s3_options"))


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def impatient(store: Store) -> RunLock:
    return RunLock(store, beat_s=0.05, patience_s=0.3)


def patient(store: Store) -> RunLock:
    return RunLock(store, beat_s=0.05, patience_s=FOR_EVER)


def leave_lock(store: Store, generation: int = 1, **facts: Any) -> Owner:
    """Leave the lock of an owner that differs from this process in some facts."""
    owner = replace(Owner.this_process(generation), **facts)
    store.commit(f"{FOLDER}/{generation:06d}.json", json.dumps(asdict(owner)).encode())
    return owner


def beat(store: Store, owner: Owner, count: int, *, released: bool = False) -> None:
    content = {"token": owner.token, "count": count, "released": released}
    name = f"{FOLDER}/{owner.generation:06d}.beat.json"
    store.replace(name, json.dumps(content).encode())


def error_of(lock: RunLock) -> type[Exception] | None:
    try:
        lock.check()
    except RunError as error:
        return type(error)
    return None


# Who may start


def test_a_run_is_held_by_one_until_it_is_released(store: Store) -> None:
    with submitters(()) as (other,):
        with patient(store) as lock:
            words = other.take(store, patience_s=FOR_EVER)
            assert store.location("") in words
            assert f"process {os.getpid()} of " in words
            assert "works on this run; wait until it is done, or end it" in words
            with pytest.raises(RunLockedError, match=f"process {os.getpid()} of"):
                patient(store).__enter__()  # nor another thread of this process
            lock.check()
        assert other.take(store) == "ok"
        assert store.list(FOLDER) == {"000002.json", "000002.beat.json"}, "the first's are gone"
        with pytest.raises(RunLockedError, match=f"process {other.process.pid} of"):
            patient(store).__enter__()
        assert other.ask("release") == "ok"
    with patient(store):
        assert store.exists(f"{FOLDER}/000003.json")


@pytest.mark.parametrize("is_reaped", [True, False], ids=["reaped", "zombie"])
def test_a_killed_owner_is_followed_at_once(local: Store, is_reaped: bool) -> None:
    with submitters(()) as (owner,):
        assert owner.take(local) == "ok"
        owner.process.kill()
        if is_reaped:
            owner.process.wait()
        else:
            os.waitid(os.P_PID, owner.process.pid, os.WEXITED | os.WNOWAIT)
        with patient(local) as lock:
            lock.check()


def test_a_stopped_owner_is_alive(local: Store) -> None:
    with submitters(()) as (owner,):
        assert owner.take(local, beat_s=0.05, patience_s=FOR_EVER) == "ok"
        owner.process.send_signal(signal.SIGSTOP)
        with pytest.raises(RunLockedError, match=f"process {owner.process.pid} of"):
            impatient(local).__enter__()
        owner.process.send_signal(signal.SIGCONT)
        assert owner.ask("check") == "ok"


def test_an_owner_that_ended_before_the_host_was_booted_is_dead(local: Store) -> None:
    leave_lock(local, boot_id="an earlier boot")
    with patient(local) as lock:
        lock.check()


def test_another_process_with_the_owners_number_is_not_the_owner(local: Store) -> None:
    with submitters(()) as (other,):
        owner = leave_lock(local, pid=other.process.pid)
        assert abs(owner.started_s - Owner.this_process(1).started_s) < 1
        leave_lock(local, 2, pid=other.process.pid, started_s=owner.started_s - 100)
        with patient(local) as lock:
            lock.check()


ELSEWHERE = {
    "another host": {"host": "elsewhere"},
    "another container": {"pid_namespace": "pid:[1]"},
    "another user": {"user": "somebody"},
}


@pytest.mark.parametrize("facts", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.parametrize("has_beaten", [True, False])
def test_an_owner_elsewhere_whose_heart_rests_is_followed(
    local: Store, facts: dict[str, str], has_beaten: bool
) -> None:
    owner = leave_lock(local, pid=1, **facts)
    if has_beaten:
        beat(local, owner, 1)
    with impatient(local) as lock:
        lock.check()


@pytest.mark.parametrize("facts", ELSEWHERE.values(), ids=ELSEWHERE)
def test_an_owner_elsewhere_whose_heart_beats_is_not(local: Store, facts: dict[str, str]) -> None:
    owner = leave_lock(local, pid=1, **facts)
    is_over = threading.Event()

    def live() -> None:
        count = 0
        while not is_over.wait(0.02):
            beat(local, owner, count := count + 1)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(RunLockedError, match=f"process 1 of {owner.user} on {owner.host}"):
            patient(local).__enter__()
    finally:
        is_over.set()
        thread.join()
    beat(local, owner, 0, released=True)
    with patient(local) as lock:
        lock.check()


def test_an_owner_elsewhere_that_releases_while_it_is_watched_is_followed(local: Store) -> None:
    owner = leave_lock(local, host="elsewhere")
    beat(local, owner, 1)
    timer = threading.Timer(0.2, beat, (local, owner, 2), {"released": True})
    timer.start()
    with patient(local) as lock:
        lock.check()
    timer.join()


def test_of_many_that_find_a_dead_owner_one_goes_on(tmp_path: Path, s3_options: Any) -> None:
    stores = [Store(str(tmp_path / f"run-{i}")) for i in range(6)]
    stores += [Store(f"s3://bucket/run-{i}", s3_options) for i in range(3)]
    with submitters(*[()] * 8) as racers:
        for store in stores:
            leave_lock(store, boot_id="an earlier boot")
            for racer in racers:
                racer.tell([store.url, dict(store.options), {}])
            heard = [racer.hear() for racer in racers]
            assert heard.count("ok") == 1, heard
            assert sum("works on this run" in words for words in heard) == 7
            assert {name for name in store.list(FOLDER) if "beat" not in name} == {"000002.json"}
            assert racers[heard.index("ok")].ask("check") == "ok"


def slow(store: Store, meanwhile: Callable[[], object]) -> Store:
    """Return the store of a process in which much time passes just before its first commit."""

    class SlowStore(Store):
        def commit(self, name: str, content: bytes) -> bool:
            meanwhile()
            return super().commit(name, content)

    return SlowStore(store.url, store.options)


def test_a_generation_that_others_have_left_behind_is_not_taken(local: Store) -> None:
    leave_lock(local, boot_id="an earlier boot")
    with ExitStack() as stack:

        def meanwhile() -> None:
            with patient(local):
                pass
            lock = stack.enter_context(patient(local))
            stack.callback(lock.check)

        with pytest.raises(RunLockedError, match="works on this run"):
            patient(slow(local, meanwhile)).__enter__()
        assert local.list(FOLDER) == {"000003.json", "000003.beat.json"}


def test_a_generation_after_one_of_a_removed_run_is_not_taken(local: Store) -> None:
    leave_lock(local, boot_id="an earlier boot")
    with ExitStack() as stack:

        def meanwhile() -> None:
            with patient(local) as lock:
                lock.remove_run()
            lock = stack.enter_context(RunLock(local))
            stack.callback(lock.check)

        with pytest.raises(RunLockedError, match="works on this run"):
            patient(slow(local, meanwhile)).__enter__()
        assert local.list(FOLDER) == {"000001.json", "000001.beat.json"}


def test_a_file_that_is_no_lock_is_named(local: Store) -> None:
    local.commit(f"{FOLDER}/000007.json", b"{}")
    with pytest.raises(RunError, match=r"run/locks/000007\.json is no lock .* remove the file"):
        patient(local).__enter__()
    assert local.list(FOLDER) == {"000007.json"}


# While it is held, and after


def test_who_was_taken_over_learns_it_and_leaves_no_trace(store: Store) -> None:
    with impatient(store) as lock:
        successor = leave_lock(store, 2, host="elsewhere")
        store.remove(f"{FOLDER}/000001.json")
        wait_until(lambda: error_of(lock) is RunLockedError)
        with pytest.raises(RunLockedError, match=r"was taken over by process \d+ of .* elsewhere"):
            lock.check()
        before = store.list(FOLDER)
    assert store.list(FOLDER) == before
    assert not store.exists(f"{FOLDER}/000002.beat.json")
    assert json.loads(store.read_bytes(f"{FOLDER}/000002.json"))["token"] == successor.token


def test_a_process_of_another_host_that_is_stopped_too_long_is_taken_over(local: Store) -> None:
    elsewhere = ("unshare", "--user", "--map-root-user", "--uts", "sh", "-c")
    elsewhere += ('hostname elsewhere && exec "$@"', "sh")
    if subprocess.run([*elsewhere, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets no process have a host name of its own")
    with submitters(elsewhere) as (owner,):
        assert owner.take(local, beat_s=0.05, patience_s=0.3) == "ok"
        with pytest.raises(RunLockedError, match="on elsewhere"):
            patient(local).__enter__()
        owner.process.send_signal(signal.SIGSTOP)
        with impatient(local) as lock:
            owner.process.send_signal(signal.SIGCONT)
            # Its first question after the stop: it looks itself before it says that all is well.
            assert f"was taken over by process {os.getpid()}" in owner.ask("check")
            owner.ask("release")
            lock.check()


def test_a_lock_that_was_removed_is_missed(local: Store) -> None:
    with impatient(local) as lock:
        shutil.rmtree(local.path(""))
        wait_until(lambda: error_of(lock) is RunLockedError)
        with pytest.raises(RunLockedError, match="lock was removed during this run"):
            lock.check()
    assert not local.exists("")


@contextmanager
def unwritable_locks(store: Store) -> Iterator[None]:
    """Put a file in the way of the lock's folder."""
    folder = Path(store.path(FOLDER))
    folder.rename(folder.with_name("away"))
    folder.write_bytes(b"")
    yield
    folder.unlink()
    folder.with_name("away").rename(folder)


def test_heartbeats_that_fail_are_told_when_they_fail_for_long(local: Store) -> None:
    with impatient(local) as lock:
        with unwritable_locks(local):
            wait_until(lambda: error_of(lock) is OutputError)
            with pytest.raises(OutputError, match=r"heartbeat .* fails for .*/run/locks is in the"):
                lock.check()
        wait_until(lambda: error_of(lock) is None)
        last = local.read_bytes(f"{FOLDER}/000001.beat.json")
        wait_until(lambda: local.read_bytes(f"{FOLDER}/000001.beat.json") != last)


def test_heartbeats_that_fail_for_a_moment_are_not_told(local: Store) -> None:
    with patient(local) as lock:
        with unwritable_locks(local):
            threads = [t for t in threading.enumerate() if t.name == "run-lock"]
            time.sleep(0.3)  # some heartbeats
            lock.check()
            assert all(thread.is_alive() for thread in threads)
        lock.check()


def test_a_process_that_could_not_release_may_try_again(local: Store) -> None:
    """As in a notebook whose disk was full: the process lives on, but not for that run."""
    with ExitStack() as unwritable, patient(local):
        unwritable.enter_context(unwritable_locks(local))
    assert not json.loads(local.read_bytes(f"{FOLDER}/000001.beat.json"))["released"]
    with patient(local) as lock:
        lock.check()


def test_a_run_can_be_removed_with_its_lock(store: Store) -> None:
    with patient(store) as lock:
        store.commit("partitions/part-000000.parquet", b"1")
        store.commit("job.yaml", b"1")
        lock.remove_run()
        assert not store.exists("")
        with patient(store) as next_one:
            pass
        before = store.read_bytes(f"{FOLDER}/000001.beat.json")
    assert store.read_bytes(f"{FOLDER}/000001.beat.json") == before, "the next one's"
    assert next_one is not lock


def test_a_run_that_was_taken_over_is_not_removed(local: Store) -> None:
    with patient(local) as lock:
        local.commit("job.yaml", b"1")
        leave_lock(local, 2, host="elsewhere")
        with pytest.raises(RunLockedError, match="was taken over by"):
            lock.remove_run()
    assert local.exists("job.yaml")


# In a run


def test_a_wrong_job_leaves_nothing_behind(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    rows = [{"id": f"r{i}", "text": "words"} for i in range(20)] + [{"id": "r0", "text": "again"}]
    with pytest.raises(JobError, match="r0"):
        pipeline.run(make_job(rows))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_complete_run_is_shown_without_a_lock(
    cluster_client: Client, make_job: Callable[..., Job]
) -> None:
    job = make_job()
    summary = pipeline.run(job, client=cluster_client)
    folder = Path(summary.run)
    beats = json.loads((folder / FOLDER / "000001.beat.json").read_text())
    assert beats["released"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert pipeline.run(job, client=cluster_client).already_complete
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_of_two_submitters_at_the_same_moment_one_runs_to_the_end(tmp_path: Path) -> None:
    arena = Arena(tmp_path)
    command = ["-m", "mas_batch.submit", "job.yaml", "--json"]
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    with ExitStack() as stack:
        children = [stack.enter_context(started(command, log, cwd=tmp_path)) for log in logs]
        codes = [child.wait(PATIENCE_S) for child in children]
    texts = [log.read_text() for log in logs]
    assert sorted(codes) == [0, 4], texts
    winner = codes.index(0)
    assert f"process {children[winner].pid} of" in texts[1 - winner]
    assert "works on this run; wait until it is done" in texts[1 - winner]
    assert "Traceback" not in texts[1 - winner]
    run = arena.opened()
    ids = run.arrow()["record_id"].to_pylist()
    assert ids == sorted(set(ids))
    assert len(ids) == run.manifest["counts"]["results"] == 60
    answers = run.arrow("answers").select(["record_id", "agent_id", "sample_id"]).to_pylist()
    assert len({tuple(row.values()) for row in answers}) == len(answers)
    assert len(arena.events("RunStarted")) == 1, "the other did not come as far"
