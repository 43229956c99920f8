"""The job file: every mistake has one message that names file, key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import dask.config
import pytest
from pydantic import ValidationError

from mas_batch.errors import ExitCode, JobError
from mas_batch.job import fingerprint
from mas_batch.job_file import check_job, load_job

JOB = """
name: tiny
corpus: {path: docs/*.jsonl}
task: {kind: summarize}
agents:
  - {name: a, model: echo}
  - {name: b, model: "echo:other", samples: 2, sampling: {temperature: 0.5}}
output: {path: ../runs}
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    folder = tmp_path / "jobs"
    folder.mkdir()
    file = folder / "tiny.yaml"
    file.write_text(JOB)
    return file


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        (
            "routing.policy=fast",
            "routing.policy",
            "'fast' is not allowed; allowed: capability, round-robin, random, least-loaded",
        ),
        (
            "routing.polcy=x",
            "routing.polcy",
            "unknown key; did you mean 'policy'? allowed: policy, ",
        ),
        ("routing.mode=window", "routing.mode", "unknown key: there is one way of routing now"),
        ("zebra=red", "zebra", "unknown key; allowed: name, corpus, "),
        ("agents.0.sampling.heat=1", "agents.0.sampling.heat", "allowed: temperature, top_p, "),
        ("agents.a.count=0", "agents.0.count", "0 is not allowed"),
        ("agents.a.count=two", "agents.0.count", "'two' is not allowed"),
        ("agents.c.count=1", "agents.c", "no item 'c'; allowed: a, b"),
        ("agents.5.count=1", "agents.5", "no item '5'; allowed: a, b"),
        ("agents=[]", "agents", "at least 1 item"),
        ("corpus.limit=9223372036854775808", "corpus.limit", "9223372036854775808 is not allowed"),
        ("agents.0.name=b", "agents", "names must differ, got b, b"),
        ("agents.0.name=B", "agents", "names must differ, got B, b"),
        ("agents.0.name=../x", "agents.0.name", "'../x' is not allowed"),
        ("agents.0.model=http://x", "agents.0.model", "'http://x' is not a model; allowed: echo"),
        ("agents.0.model=pypi://d/p", "agents.0.model", "the version is required"),
        ("agents.0.engine=tpu", "agents.0.engine", "'tpu' is not allowed; allowed: auto, echo, "),
        ('agents.0.engine="a: b"', "agents.0.engine", "'a: b' is not allowed; allowed: auto, "),
        ("agents.0.sampling.temperature=9", "agents.0.sampling.temperature", "9 is not allowed"),
        ("agents.0.sampling.top_p=0.5", "agents.0.sampling", "top_p and top_k need a temperature"),
        ("agents.0.parallel.tensor=2", "agents.0.parallel.tensor", "2 is not allowed"),
        ("agents.0.capabilities=[score]", "agents.a.capabilities", "does not include 'summarize'"),
        ("agents.0.prompt=hello", "agents.0.prompt", "must contain {text}"),
        ("task.kind=sing", "task.kind", "'sing' is not allowed; allowed: summarize, translate, "),
        ("task.labels=[x, y]", "task.labels", "for `kind: classify` and no other"),
        ("task.max_new_tokens=ten", "task.max_new_tokens", "'ten' is not allowed"),
        ("routing.answers_per_record=4", "routing.answers_per_record", "more than the 3"),
        ("merge.method=weighted", "merge.accuracies", "missing: a, b"),
        ("merge.accuracies={z: 0.5}", "merge.accuracies", "no agent is called 'z'; allowed: a, b"),
        ("merge.accuracies={a: 1.5}", "merge.accuracies.a", "1.5 is not allowed"),
        ("output.max_failed_fraction=2", "output.max_failed_fraction", "2 is not allowed"),
        ("corpus.path=[]", "corpus.path", "[] is not allowed"),
        ("corpus=7", "corpus", "7 is not allowed"),
        ("name=a b", "name", "'a b' is not allowed"),
        ("partition.max_tokens=0", "partition.max_tokens", "0 is not allowed"),
        ("cluster={scheduler: x, scheduler_file: y}", "cluster", "not both"),
    ],
)
def test_mistakes_are_named(job_file: Path, override: str, key: str, words: str) -> None:
    with pytest.raises(JobError) as caught:
        load_job(job_file, [override])
    assert caught.value.key == key
    assert words in str(caught.value)
    assert caught.value.exit_code == ExitCode.BAD_JOB


def test_the_message_names_the_file(job_file: Path) -> None:
    with pytest.raises(JobError, match=r"tiny\.yaml: routing\.policy: 'x' is not allowed"):
        load_job(job_file, ["routing.policy=x"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid YAML"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
        ("name: x", "corpus: is required and missing (and 3 more problems)"),
    ],
)
def test_broken_files(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(JobError) as caught:
        load_job(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    "content",
    [
        BOMB,
        BOMB.replace("[", "{<<: [").replace("]", "]}").replace("[x", "[{k: x}"),
        "a: &a " + "x" * 1_000_000 + "\nb: [" + ", ".join(["*a"] * 1000) + "]",
    ],
    ids=["lists", "merges", "long text"],
)
def test_aliases_that_stand_for_too_much(tmp_path: Path, content: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(JobError, match=r"not valid YAML: line \d+, column \d+: the aliases stand"):
        load_job(file)


@pytest.mark.parametrize(
    "content",
    ["a: &a [1, *a]", "a: &a {b: {c: *a}}", "a: &a {<<: *a}"],
    ids=["list", "map", "merge"],
)
def test_an_anchor_that_contains_itself(tmp_path: Path, content: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(JobError, match=r"line 1, column \d+: an anchor contains itself"):
        load_job(file)


@pytest.mark.parametrize(
    ("key", "at"),
    [
        ("task.prompt", "task.prompt"),
        ("task.language", "task.language"),
        ("name", "name"),
        ("agents.a.name", "agents.0.name"),
        ("agents.a.options.reply", "agents.0.options.reply"),
        ("corpus.text", "corpus.text"),
        ("agents.a.model", "agents.0.model"),
        ("task.labels", "task.labels"),
    ],
)
def test_text_that_utf_8_cannot_hold(job_file: Path, key: str, at: str) -> None:
    with pytest.raises(JobError) as caught:
        load_job(job_file, [f'{key}="{{text}}\\ud800"'])
    assert caught.value.key == at
    assert caught.value.message.startswith("character 7 is half a surrogate pair")


def test_a_pair_of_escapes_is_a_character(job_file: Path) -> None:
    assert (
        load_job(job_file, ['task.prompt="{text} \\ud83d\\ude00"']).task.prompt
        == "{text} \U0001f600"
    )


def test_a_key_that_utf_8_cannot_hold_and_a_dict_that_contains_itself() -> None:
    with pytest.raises(JobError, match=r"task\.\(a key\): character 1 is half"):
        check_job({"task": {"\ud800": 1}})
    endless: dict[str, object] = {}
    endless["task"] = endless
    with pytest.raises(JobError, match="contains itself"):
        check_job(endless)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"nowhere\.yaml: no such job file"):
        load_job(tmp_path / "nowhere.yaml")


def test_classification_needs_labels(job_file: Path) -> None:
    with pytest.raises(JobError, match="at least two"):
        load_job(job_file, ["task.kind=classify"])
    with pytest.raises(JobError, match="all different"):
        load_job(job_file, ["task={kind: classify, labels: [x, x]}"])


def test_greedy_samples_are_refused_for_real_models(job_file: Path) -> None:
    with pytest.raises(JobError, match="greedy answers would be the same"):
        load_job(job_file, ["agents.0.model=org/name", "agents.0.samples=2"])


def test_paths_are_relative_to_the_file_and_overrides_to_the_working_directory(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    job = load_job(job_file, ["output.path=out"])
    assert job.corpus.path == (str(job_file.parent / "docs/*.jsonl"),)
    assert job.output.path == str(elsewhere / "out")
    assert load_job(job_file).output.path == str(tmp_path / "runs")
    overrides = ["cluster.tls_ca_file=ca.pem", "agents.a.model=./m"]
    job = load_job(job_file, overrides)
    assert job.cluster.tls_ca_file == str(elsewhere / "ca.pem")
    assert job.agents[0].model == str(elsewhere / "m")
    assert load_job(job_file, ["corpus.path=s3://b/x/*"]).corpus.path == ("s3://b/x/*",)


def test_site_defaults_come_from_dask_configuration(job_file: Path) -> None:
    with dask.config.set({"mas-batch": {"routing": {"window": 5, "max-attempts": 7}}}):
        job = load_job(job_file, ["routing.window=1"])
    assert (job.routing.window, job.routing.max_attempts) == (1, 7)


def test_identity_ignores_what_only_changes_speed(job_file: Path) -> None:
    base = fingerprint(load_job(job_file).identity())
    for override in (
        "agents.0.count=3",
        "agents.0.threads=2",
        "agents.0.batch_tokens=99",
        "routing.policy=capability",  # every agent is asked anyway
        "routing.window=5",
        "cluster.scheduler=tcp://x:1",
        "output.path=elsewhere",
        "output.max_failed_fraction=1",
    ):
        assert fingerprint(load_job(job_file, [override]).identity()) == base, override
    for override in (
        "agents.0.model=echo:new",
        "agents.1.sampling.seed=3",
        "task.max_new_tokens=65",
        "merge.method=vote",
        "corpus.text=body",
        "routing.answers_per_record=1",
        "partition.max_records=3",
    ):
        assert fingerprint(load_job(job_file, [override]).identity()) != base, override


def test_the_policy_belongs_to_the_identity_where_it_decides_who_is_asked(job_file: Path) -> None:
    jobs = [
        load_job(job_file, ["routing.answers_per_record=1", f"routing.policy={policy}"])
        for policy in ("capability", "least-loaded")
    ]
    assert fingerprint(jobs[0].identity()) != fingerprint(jobs[1].identity())


def test_a_changed_job_is_checked_again(job_file: Path) -> None:
    job = load_job(job_file)
    changed = job.with_changes(agents=job.agents[:1])
    assert [agent.name for agent in changed.agents] == ["a"]
    assert changed.with_changes(agents=job.agents) == job
    with pytest.raises(ValidationError, match="at least 1 item"):
        job.with_changes(agents=())
    with pytest.raises(ValidationError, match="more than the 3"):
        job.with_changes(routing=job.routing.with_changes(answers_per_record=4))
    with pytest.raises(ValidationError, match="must not be below count"):
        job.agents[0].with_changes(count=3, max_count=2)
    with pytest.raises(ValidationError, match="not permitted"):
        job.with_changes(agnets=())


@pytest.mark.parametrize("names", [["a"], ["b"], ["c"], ["a", "b"], ["b", "c"], ["a", "b", "c"]])
@pytest.mark.parametrize(
    "more",
    [
        ["routing.answers_per_record=3"],
        ["routing.adaptive.first=3"],
        ["merge={method: weighted, accuracies: {a: 0.6, b: 0.7, c: 0.8}}"],
        ["routing={policy: weighted-round-robin, weights: {a: 1, c: 2}}"],
        ["routing.escalate={agent: c, below: 0.9}", "routing.answers_per_record=2"],
    ],
)
def test_a_job_with_some_of_its_agents_says_nothing_of_the_others(
    job_file: Path, more: list[str], names: list[str]
) -> None:
    agents = "[{name: a, model: echo}, {name: b, model: echo, samples: 2}, {name: c, model: echo}]"
    job = load_job(job_file, [f"agents={agents}", *more])
    some = job.with_agents(names)
    assert [agent.name for agent in some.agents] == names
    assert {*some.merge.accuracies, *some.routing.weights} <= set(names)
    assert some.answers_per_record == min(
        job.answers_per_record, sum(agent.samples for agent in some.first_agents)
    )
    if len(names) == 3:
        assert some == job


def test_a_dict_makes_a_job() -> None:
    job = check_job(
        {
            "name": "n",
            "corpus": {"path": "x.csv"},
            "task": {"kind": "classify", "labels": ["a", "b"]},
            "agents": [{"name": "e", "model": "echo", "resources": {"GPU": 1}}],
            "output": {"path": "out"},
        }
    )
    assert job.answers_per_record == 1
    assert job.capabilities(job.agents[0]) == {"classify": 1.0, "GPU": 1}


def test_a_number_among_the_options_is_no_secret(job_file: Path) -> None:
    one = "agents=[{name: a, model: echo, options: {%s: %s}}]"
    job = load_job(job_file, [one % ("seconds_per_token", "0.1")])
    assert job.agents[0].options == {"seconds_per_token": 0.1}
    with pytest.raises(JobError, match="a secret has no place in a job"):
        load_job(job_file, [one % ("auth_token", "abc")])


@pytest.mark.parametrize("file", sorted(Path("jobs").glob("*.yaml")), ids=lambda file: file.name)
def test_the_shipped_jobs_are_valid(file: Path) -> None:
    assert load_job(file).name
