"""Which workers hold which engine, decided without a cluster."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_batch.agents import posts as posts_module
from mas_batch.agents.posts import (
    Host,
    Post,
    WorkerInfo,
    can_host,
    check_served,
    place,
    posts_of,
    unserved,
)
from mas_batch.errors import JobError
from mas_batch.job import Job
from mas_batch.job_file import check_job


def job(*agents: dict[str, Any]) -> Job:
    return check_job(
        {
            "name": "j",
            "corpus": {"path": "x.jsonl"},
            "task": {"kind": "translate"},
            "agents": [{"model": f"echo:{agent['name']}", **agent} for agent in agents],
            "output": {"path": "out"},
        }
    )


def worker(name: str, **resources: float) -> WorkerInfo:
    return WorkerInfo(f"tcp://{name}", name, resources)


def post(name: str, most: int = 1, *, wanted: int = 1, size: int = 1, **needs: float) -> Post:
    return Post(name, (name,), {"translate": 1, **needs}, wanted, most, size)


def who(hosts: Iterable[Host]) -> dict[str, str]:
    """Return worker → post."""
    return {member.removeprefix("tcp://"): h.post for h in hosts for member in h.members}


# Posts


def test_agents_share_a_post_if_their_engine_is_held_alike_and_needs_the_same() -> None:
    same: dict[str, Any] = {"model": "echo", "options": {"delay_s": 0.5}}
    posts = posts_of(
        job(
            {"name": "a", **same, "count": 2},
            {"name": "b", **same, "prompt": "Say {text}", "max_count": 3},
            {"name": "other-option", "model": "echo"},
            {"name": "gpu", **same, "resources": {"GPU": 1}},
            {"name": "threads", **same, "threads": 2},
            {"name": "alone", **same, "share": False},
            {"name": "c", **same, "samples": 2, "sampling": {"temperature": 1.0}},
        )
    )
    assert [each.agents for each in posts] == [
        ("a", "b", "c"), ("other-option",), ("gpu",), ("threads",), ("alone",),
    ]  # fmt: skip
    assert (posts[0].name, posts[0].wanted, posts[0].most) == ("a+b+c", 2, 3)
    assert posts[2].needs == {"translate": 1.0, "GPU": 1}
    assert posts[4].name == "alone"


def test_a_long_name_is_cut_and_stays_unique() -> None:
    names = [f"{letter * 30}{i}" for letter in "ab" for i in range(2)]
    agents = [{"name": name, "model": f"echo:{name[0]}"} for name in names]
    joined = ["+".join(names[:2]), "+".join(names[2:])]
    assert [each.name for each in posts_of(job(*agents))] == joined
    long = [{"name": f"{'x' * 40}{i}", "model": "echo"} for i in range(3)]
    assert [each.name for each in posts_of(job(*long))] == [f"{'x' * 40}0+2"]


def test_a_pass_with_some_of_the_agents_keeps_the_posts_name() -> None:
    whole = job({"name": "a", "model": "echo"}, {"name": "b", "model": "echo"})
    part = whole.with_agents(["b"])
    (only,) = posts_of(part, {"b": "a+b"})
    assert (only.name, only.agents) == ("a+b", ("b",))


# Placement


def test_unlike_workers_go_to_the_posts_that_they_can_serve() -> None:
    workers = [worker("w0", translate=1), worker("w1", translate=1, GPU=1)]
    posts = [post("big", GPU=1), post("small")]
    assert who(place(workers, posts)) == {"w1": "big", "w0": "small"}


def test_a_flexible_worker_gives_way_to_a_post_that_has_no_other() -> None:
    # Both posts could use a-gpu; only it can serve `gpu`.
    workers = [worker("a-gpu", translate=1, GPU=1), worker("z", translate=1, extra=1, more=1)]
    assert who(place(workers, [post("any"), post("gpu", GPU=1)])) == {"a-gpu": "gpu", "z": "any"}


def test_every_posts_first_host_comes_before_a_second() -> None:
    hosts = place([worker(f"w{i}", translate=1) for i in range(3)], [post("a", 3), post("b", 3)])
    assert sorted(who(hosts).values()) == ["a", "a", "b"]


def test_what_is_wanted_comes_before_what_is_only_allowed() -> None:
    workers = [worker(f"w{i}", translate=1) for i in range(8)]
    posts = [post("may", 8), post("wants", 5, wanted=5)]
    assert Counter(who(place(workers, posts)).values()) == {"wants": 5, "may": 3}


def test_no_more_hosts_than_allowed() -> None:
    assert len(place([worker(f"w{i}", translate=1) for i in range(5)], [post("a", 2)])) == 2


def test_workers_go_to_the_post_that_they_are_named_for() -> None:
    workers = [worker(f"{name}-{i}", translate=1) for name in ("b", "a", "w") for i in range(2)]
    shared = Post("b+c", ("b", "c"), {"translate": 1}, 1, 3)
    placed = who(place(workers, [post("a", 2), shared]))
    assert placed == {"a-0": "a", "a-1": "a", "b-0": "b+c", "b-1": "b+c", "w-0": "b+c"}
    placed = who(place([worker("b+c-0", translate=1), worker("c-7", translate=1)], [shared]))
    assert placed == {"b+c-0": "b+c", "c-7": "b+c"}


def test_nobody_is_left_without_a_worker_for_a_name() -> None:
    workers = [worker("a-0", translate=1), worker("a-1", translate=1)]
    assert who(place(workers, [post("a", 2), post("b")])) == {"a-0": "a", "a-1": "b"}


def test_a_restarted_worker_gets_its_post_back_and_others_go_where_most_is_lacking() -> None:
    posts = [post("a", 2, wanted=2), post("b", 2, wanted=2), post("c", 4, wanted=4)]
    hosts = [Host(name, name[0], (name,)) for name in ("a0", "b0", "c0")]
    assert who(place([worker("b-1", translate=1)], posts, hosts)) == {"b-1": "b"}
    assert who(place([worker("other", translate=1)], posts, hosts)) == {"other": "c"}
    assert place([worker("other")], posts, hosts) == []
    full = [Host(str(i), name, (str(i),)) for i, name in enumerate("aabbcccc")]
    assert place([worker("other", translate=1)], posts, full) == []


def test_a_host_of_several_workers_is_formed_whole_or_not_at_all() -> None:
    workers = [worker(f"w{i}", translate=1) for i in range(5)]
    posts = [post("pair", 3, size=2)]
    hosts = place(workers, posts)
    assert [host.members for host in hosts] == [("tcp://w0", "tcp://w1"), ("tcp://w2", "tcp://w3")]
    assert [host.host_id for host in hosts] == ["tcp://w0", "tcp://w2"]
    assert place(workers, posts, hosts) == []
    assert place([*workers, worker("w5", translate=1)], posts, hosts) == [
        Host("tcp://w4", "pair", ("tcp://w4", "tcp://w5"))
    ]


def test_a_host_that_cannot_be_formed_leaves_its_workers_to_others() -> None:
    workers = [worker("w0", translate=1, GPU=1), worker("w1", translate=1)]
    posts = [post("gang", size=2, GPU=1), post("any", 2, wanted=2)]
    assert who(place(workers, posts)) == {"w0": "any", "w1": "any"}
    assert [each.name for each in unserved(posts, place(workers, posts))] == ["gang"]


def test_ten_thousand_workers_compare_kinds_not_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any) -> bool:
        calls.append(args)
        return can_host(*args)

    monkeypatch.setattr(posts_module, "can_host", counted)
    kinds: list[dict[str, float]] = [{}, {"GPU": 1}, {"long": 1}, {"GPU": 1, "long": 1}]
    workers = [worker(f"w{i}", translate=1, **kinds[i % 4]) for i in range(10_000)]
    posts = [post("any", 4096), post("gpu", 4096, GPU=1), post("long", 4096, long=1)]
    placed = Counter(host.post for host in place(workers, posts))
    assert placed == {"any": 3334, "gpu": 3333, "long": 3333}
    assert len(calls) == 4 * 3, "kinds × posts"


def test_where_nothing_is_left_nobody_searches_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    free_group = posts_module._Placement._free_group

    def counted(self: Any, number: int) -> Any:
        calls.append(number)
        return free_group(self, number)

    monkeypatch.setattr(posts_module._Placement, "_free_group", counted)
    needs: list[dict[str, float]] = [{"GPU": 1}, {"long": 1}]
    workers = [worker(f"w{i}", translate=1, **needs[i % 2]) for i in range(200)]
    posts = [post(f"p{i}", 2, **needs[i % 2]) for i in range(200)]
    assert set(Counter(host.post for host in place(workers, posts)).values()) == {1}
    assert len(calls) == 2 * len(posts), "once for its first host, once in vain"


def test_a_missing_capability_lists_what_is_there() -> None:
    the_job = job(
        {"name": "z"},
        {"name": "a", "model": "echo", "resources": {"GPU": 1}},
        {"name": "b", "model": "echo", "resources": {"GPU": 1}},
    )
    workers = [worker("w0", translate=2), worker("w1")]
    with pytest.raises(JobError) as caught:
        check_served(workers, posts_of(the_job), place(workers, posts_of(the_job)), the_job)
    assert caught.value.key == "agents.1.capabilities"
    message = str(caught.value)
    assert "'a' and 'b' need a worker with GPU=1,translate=1; none is free" in message
    assert "w0 (tcp://w0) declares translate=2; w1 (tcp://w1) declares no resources" in message
    assert "dask worker SCHEDULER --resources 'GPU=1,translate=1'" in message
    (gang,) = (Post("a", ("a",), {"translate": 1}, 1, 1, size=3),)
    with pytest.raises(JobError, match="'a' needs 3 workers, each with translate=1; so many are"):
        check_served(workers, [gang], [], the_job)


names = st.sampled_from(["w", "p0", "p1", "p2"])
offers = st.sets(st.sampled_from("xyz"))
all_workers = st.lists(st.tuples(names, offers), max_size=12)
all_posts = st.lists(
    st.tuples(offers, st.integers(1, 3), st.integers(0, 2), st.integers(1, 3)), max_size=4
)


def make_workers(drawn: list[tuple[str, set[str]]]) -> list[WorkerInfo]:
    return [worker(f"{name}-{i}", **dict.fromkeys(o, 1)) for i, (name, o) in enumerate(drawn)]


def make_posts(drawn: list[tuple[set[str], int, int, int]], size: int | None = None) -> list[Post]:
    return [
        Post(f"p{i}", (f"p{i}",), dict.fromkeys(needs, 1), wanted, wanted + more, size or own_size)
        for i, (needs, wanted, more, own_size) in enumerate(drawn)
    ]


@given(all_workers, all_posts, st.integers(0, 12), st.integers(0, 12), st.randoms())
def test_hosts_are_whole_capable_disjoint_and_stay(
    drawn_workers: list[tuple[str, set[str]]],
    drawn_posts: list[tuple[set[str], int, int, int]],
    num_first: int,
    num_gone: int,
    lot: random.Random,
) -> None:
    workers, posts = make_workers(drawn_workers), make_posts(drawn_posts)
    by_address = {each.address: each for each in workers}
    by_name = {each.name: each for each in posts}
    there = place(workers[:num_first], posts)[num_gone:]  # then some leave, and others come
    new = place(workers, posts, there)
    members = [member for host in [*there, *new] for member in host.members]
    assert len(members) == len(set(members)), "no worker is in two hosts"
    for host in new:
        assert len(host.members) == by_name[host.post].size
        assert host.host_id == host.members[0]
        assert all(can_host(by_address[m], by_name[host.post]) for m in host.members)
    counts = Counter(host.post for host in [*there, *new])
    assert all(counts[each.name] <= each.most for each in posts)
    shuffled = list(workers)
    lot.shuffle(shuffled)
    assert place(shuffled, posts, there) == new, "the order of the workers does not matter"
    assert place(workers, posts, [*there, *new]) == [], "nothing is left to be done"


@given(all_workers, all_posts)
def test_as_many_posts_as_possible_get_a_first_host(
    drawn_workers: list[tuple[str, set[str]]], drawn_posts: list[tuple[set[str], int, int, int]]
) -> None:
    workers, posts = make_workers(drawn_workers), make_posts(drawn_posts, size=1)
    choices = [{each.name for each in workers if can_host(each, post)} for post in posts]
    served = len(posts) - len(unserved(posts, place(workers, posts)))
    assert served == most_served(choices)


def most_served(choices: list[set[str]], used: frozenset[str] = frozenset()) -> int:
    """Brute force: how many can have a worker of their own?"""
    if not choices:
        return 0
    without = most_served(choices[1:], used)
    others = (1 + most_served(choices[1:], used | {each}) for each in choices[0] - used)
    return max([without, *others])
