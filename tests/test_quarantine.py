"""A record that kills its worker: found by real kills, given up, its mates answered once."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch import job
from mas_batch.agents.answering import AgentProfile, answer_records
from mas_batch.agents.quarantine import Journal, answer_carefully
from mas_batch.engines import load_engine
from mas_batch.engines.base import EngineConfig, Sampling
from mas_batch.errors import EngineError, EngineRefusedError, Reason, RunError
from mas_batch.models import fetch
from mas_batch.records import Answer, Record
from mas_batch.run_folder.storage import Store
from mas_batch.tasks import make_task
from tests.direct_client import DirectClient
from tests.waiting import PATIENCE_S

TASK = make_task(job.Task(kind="summarize"))
SAMPLED = Sampling(max_new_tokens=8, temperature=1.0, num_samples=2)
PROFILE = AgentProfile("agent", "family", None, None, SAMPLED)
POISON = "poison"
FOLDER = "journal/agent=agent"

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.test_quarantine"])


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "run"))
    return Store("s3://bucket/run", request.getfixturevalue("s3_options"))


def records_of(number: int, *, poison: Sequence[int] = ()) -> list[Record]:
    texts = [f"{POISON if i in poison else 'text'} number {i} in words" for i in range(number)]
    return [Record(f"r{i}", text) for i, text in enumerate(texts)]


def asker(**options: Any) -> Callable[[Sequence[Record]], list[Answer]]:
    engine = load_engine("echo", fetch("echo"), EngineConfig(options=options))
    return lambda records: answer_records(records, TASK, DirectClient(engine), PROFILE)


def timeless(answers: Sequence[Answer]) -> list[Answer]:
    return [replace(answer, t_compute_s=0.0) for answer in answers]


def answers_without_deaths(records: Sequence[Record]) -> list[Answer]:
    return timeless(asker()(records))


# --- Real processes


@dataclass(frozen=True, slots=True)
class Job:
    """What a child process does, and where it leaves what came of it."""

    store: Store
    records: list[Record]
    folder: Path
    options: dict[str, Any] = field(default_factory=lambda: {"faults": {POISON: "kill"}})

    def run(self, name: str, first_together: Barrier | None = None) -> None:
        """In the child: answer; the first record is asked by all copies at the same time."""
        inner = asker(**self.options)

        def ask(records: Sequence[Record]) -> list[Answer]:
            (record,) = records
            with self.asked_file.open("a") as file:
                file.write(f"{record.record_id}\n")
            if first_together is not None and record == self.records[0]:
                first_together.wait(PATIENCE_S)
            return inner(records)

        answers = answer_carefully(self.records, ask, Journal(self.store, 7, "agent"), PROFILE)
        (self.folder / name).write_bytes(pickle.dumps(answers))

    def start(self, name: str, first_together: Barrier | None = None) -> BaseProcess:
        child = CHILDREN.Process(target=self.run, args=(name, first_together))
        child.start()
        return child

    def answers(self, name: str) -> list[Answer]:
        found: list[Answer] = pickle.loads((self.folder / name).read_bytes())
        return found

    @property
    def asked_file(self) -> Path:
        return self.folder / "asked"

    @property
    def asked(self) -> Counter[str]:
        return Counter(self.asked_file.read_text().split())


def exit_code(child: BaseProcess) -> int | None:
    child.join()
    return child.exitcode


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "poison"),
    [(4, [0]), (4, [1]), (4, [3]), (1, [0]), (5, [1, 2])],
    ids=["first", "middle", "last", "only", "two"],
)
def test_a_poison_record_is_given_up_and_its_mates_are_answered_once(tmp_path, number, poison):
    copy = Job(Store(str(tmp_path / "run")), records_of(number, poison=poison), tmp_path)
    for _ in range(2 * len(poison)):
        assert exit_code(copy.start("answers")) == -signal.SIGKILL
    assert exit_code(copy.start("answers")) == 0

    answers = copy.answers("answers")
    failed = [answer for answer in answers if answer.reason is not None]
    innocent = [record for i, record in enumerate(copy.records) if i not in poison]
    assert [(a.record_id, a.sample_id) for a in failed] == [
        (f"r{i}", s) for i in poison for s in (0, 1)
    ]
    assert {(a.reason, a.text, a.finish_reason) for a in failed} == {
        (Reason.WORKER_DIED, None, "error")
    }
    assert "its worker died in 2 of 2 tries" in failed[0].message
    assert timeless([a for a in answers if a.reason is None]) == answers_without_deaths(innocent)
    assert [a.record_id for a in answers[::2]] == [record.record_id for record in copy.records]
    assert copy.asked == {r.record_id: 1 if r in innocent else 2 for r in copy.records}


@pytest.mark.faults
def test_copies_at_the_same_time_give_the_same_answers(store, tmp_path):
    copy = Job(store, records_of(12), tmp_path, {"seconds_per_batch": 0.01})
    together = CHILDREN.Barrier(2)
    children = [copy.start(name, together) for name in ("one", "other")]
    assert [exit_code(child) for child in children] == [0, 0]
    assert copy.answers("one") == copy.answers("other")  # to the measured seconds: the first win
    assert timeless(copy.answers("one")) == answers_without_deaths(copy.records)
    assert copy.asked["r0"] == 2
    assert set(copy.asked.values()) <= {1, 2}


# --- In this process


class Death(BaseException):
    """Stands for the death of the process: nothing that handles exceptions sees it."""


def carefully(
    records: Sequence[Record],
    ask: Callable[[Sequence[Record]], list[Answer]],
    store: Store,
    max_deaths: int = 2,
) -> list[Answer]:
    return answer_carefully(
        records, ask, Journal(store, 7, "agent"), PROFILE, max_deaths=max_deaths
    )


def test_deaths_and_answers_are_remembered_and_removed_in_the_end(store):
    records, answer, asked = records_of(3), asker(), Counter[str]()

    def ask(asked_for: Sequence[Record]) -> list[Answer]:
        asked[asked_for[0].record_id] += 1
        if asked_for == records[1:2]:
            raise Death
        return answer(asked_for)

    for _ in range(2):
        with pytest.raises(Death):
            carefully(records, ask, store)
    first = carefully(records, ask, store)
    assert carefully(records, ask, store) == first
    assert asked == {"r0": 1, "r1": 2, "r2": 1}
    assert [a.reason for a in first[::2]] == [None, Reason.WORKER_DIED, None]
    assert store.list(FOLDER) == {"part-000007"}
    for _ in range(2):
        Journal(store, 7, "agent").remove()
        assert store.list(FOLDER) == set()


def test_an_exception_is_not_a_death(store):
    def refuse(records: Sequence[Record]) -> list[Answer]:
        raise EngineRefusedError("a wrong key")

    records = records_of(2)
    for _ in range(3):
        with pytest.raises(EngineRefusedError, match="a wrong key"):
            carefully(records, refuse, store)
    assert timeless(carefully(records, asker(), store)) == answers_without_deaths(records)


def test_a_storage_that_fails_after_the_record_was_asked_is_not_a_death(tmp_path):
    (record,) = records_of(1)
    store, answer = Store(str(tmp_path)), asker()

    def ask_and_get_in_the_way(records: Sequence[Record]) -> list[Answer]:
        mark, *_ = tmp_path.glob(f"{FOLDER}/part-000007/*/begun-*")
        mark.with_name("answers.parquet").mkdir()
        return answer(records)

    for _ in range(3):
        with pytest.raises(RunError, match="Is a directory"):
            carefully([record], ask_and_get_in_the_way, store)
        next(tmp_path.rglob("answers.parquet")).rmdir()
    assert carefully([record], answer, store)[0].reason is None


def test_a_zombie_continues_beside_its_successor(store):
    records, answer = records_of(3), asker()
    successor: list[Answer] = []

    def paused_for_long(asked_for: Sequence[Record]) -> list[Answer]:
        if not successor:
            successor.extend(carefully(records, answer, store))
        return [replace(a, t_compute_s=1e6) for a in answer(asked_for)]

    assert carefully(records, paused_for_long, store) == successor


def test_a_zombie_continues_after_its_successor_has_removed_the_journal(store):
    records, answer = records_of(3), asker()

    def paused_for_long(asked_for: Sequence[Record]) -> list[Answer]:
        Journal(store, 7, "agent").remove()
        return answer(asked_for)

    assert timeless(carefully(records, paused_for_long, store)) == answers_without_deaths(records)


def test_a_zombie_learns_that_its_record_was_given_up(store):
    def die(records: Sequence[Record]) -> list[Answer]:
        raise Death

    records, answer = records_of(1), asker()
    given_up: list[Answer] = []

    def paused_for_long(asked_for: Sequence[Record]) -> list[Answer]:
        with pytest.raises(Death):
            carefully(records, die, store)
        given_up.extend(carefully(records, pytest.fail, store))
        return answer(asked_for)

    assert carefully(records, paused_for_long, store) == given_up
    assert {a.reason for a in given_up} == {Reason.WORKER_DIED}


@dataclass(frozen=True)
class VanishingStore(Store):
    """A store of which a copy of the task removes the journal just before this one reads it."""

    def read_table(self, name: str) -> pa.Table:
        Journal(Store(self.url, self.options), 7, "agent").remove()
        return super().read_table(name)


def test_a_journal_may_vanish_between_two_looks_at_it(store):
    answers = asker()(records_of(1))
    Journal(store, 7, "agent").keep("r0", [])
    vanishing = Journal(VanishingStore(store.url, store.options), 7, "agent")
    assert vanishing.keep("r0", answers) == answers
    assert vanishing.answers("r0") is None


def test_many_copies_remove_the_journal_at_once(tmp_path):
    journal = Journal(Store(str(tmp_path)), 7, "agent")
    errors: list[BaseException] = []

    def remove() -> None:
        try:
            journal.remove()
        except BaseException as error:
            errors.append(error)

    for i in range(100):
        (tmp_path / FOLDER / "part-000007" / str(i)).mkdir(parents=True)
    threads = [threading.Thread(target=remove) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_what_is_not_to_be_asked_is_not_asked(tmp_path):
    store = Store(str(tmp_path))
    assert carefully([], asker(), store) == []
    unusable = Record("bad", None, reason=Reason.EMPTY)
    assert carefully([unusable], pytest.fail, store) == []


def test_a_later_try_may_be_about_fewer_records(tmp_path):
    def die(records: Sequence[Record]) -> list[Answer]:
        raise Death

    store, records = Store(str(tmp_path)), records_of(3)
    for _ in range(2):
        with pytest.raises(Death):
            carefully(records, die, store)
    assert timeless(carefully(records[1:], asker(), store)) == answers_without_deaths(records[1:])


# --- Any deaths at any time


def memory_store() -> Store:
    return Store(f"memory://quarantine-{uuid.uuid4().hex}")


@dataclass(frozen=True)
class MortalStore(Store):
    """A store whose process may die before and after every commit; says whose death it was."""

    may_die: Callable[[], None] = lambda: None
    tried: list[str] = field(default_factory=list)
    """The record that is marked as begun, if there is one."""

    def commit(self, name: str, content: bytes) -> bool:
        self.may_die()
        created = super().commit(name, content)
        self.tried[:] = [content.decode()] if "/begun-" in name else []
        self.may_die()
        return created


@given(
    num_records=st.integers(1, 4),
    poison=st.sets(st.integers(0, 3)),
    fates=st.lists(st.sampled_from(["live", "live", "live", "die", "raise"]), max_size=40),
    max_deaths=st.integers(1, 3),
)
def test_whatever_dies_every_record_ends_with_exactly_its_answers(
    num_records: int, poison: set[int], fates: list[str], max_deaths: int
) -> None:
    records = records_of(num_records, poison=sorted(poison))
    expected = answers_without_deaths(records)
    deaths, coming, answer = Counter[str](), iter(fates), asker()

    def may_die() -> None:
        if next(coming, "live") == "die":
            raise Death

    def ask(asked: Sequence[Record]) -> list[Answer]:
        fate = next(coming, "live")
        if fate == "die" or POISON in str(asked[0].text):
            raise Death
        if fate == "raise":
            raise EngineRefusedError("a wrong key")
        may_die()
        return answer(asked)

    store = MortalStore(memory_store().url, may_die=may_die)
    answers = None
    while answers is None:
        store.tried.clear()
        try:
            answers = carefully(records, ask, store, max_deaths)
        except EngineRefusedError:
            pass
        except EngineError:  # the agent is to blame, and may try again from the start
            assert all(deaths[f"r{i}"] == max_deaths for i in range(3))
            assert store.list("journal") == set()
            return
        except Death:
            deaths.update(store.tried)
    guilty = {record_id for record_id, number in deaths.items() if number >= max_deaths}
    assert guilty >= {f"r{i}" for i in poison if i < num_records}
    assert set(deaths.values()) <= set(range(max_deaths + 1))
    assert [(a.record_id, a.sample_id) for a in answers] == [
        (a.record_id, a.sample_id) for a in expected
    ]
    for found, wanted in zip(timeless(answers), expected, strict=True):
        if found.record_id in guilty:
            assert (found.reason, found.text) == (Reason.WORKER_DIED, None)
        else:
            assert found == wanted


ENCODABLE = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
FLOATS = st.floats(allow_nan=False)
COUNTS = st.integers(0, 2**31 - 1)
ANY_ANSWER = st.builds(
    Answer,
    record_id=ENCODABLE,
    agent_id=ENCODABLE,
    family_id=ENCODABLE,
    sample_id=COUNTS,
    text=st.none() | ENCODABLE,
    label=st.none() | ENCODABLE,
    value=st.none() | FLOATS,
    sum_logprob=st.none() | FLOATS,
    finish_reason=ENCODABLE,
    prompt_tokens=COUNTS,
    completion_tokens=COUNTS,
    num_parts=COUNTS,
    t_compute_s=FLOATS,
    reason=st.none() | st.sampled_from(Reason),
    message=ENCODABLE,
)


@given(answers=st.lists(ANY_ANSWER, max_size=3), record_id=ENCODABLE)
def test_the_journal_gives_back_what_it_was_given(answers: list[Answer], record_id: str) -> None:
    journal = Journal(memory_store(), 0, "agent")
    assert journal.answers(record_id) is None
    assert journal.keep(record_id, answers) == answers
    assert journal.answers(record_id) == answers
    assert journal.keep(record_id, []) == answers
