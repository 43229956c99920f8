"""How far the planner is off: plan runs of unlike kinds, then run them and compare.

    python benchmarks/planner.py                     all of them (about half an hour on two cores)
    python benchmarks/planner.py --only echo marian  those whose names contain one of these
    python benchmarks/planner.py --folder DIR        keep what was found; done ones are not repeated

Every corpus is bundled data, repeated so that a run lasts half a minute or more.
A configuration is planned from a sample, or from a run of another one, right before it runs: on a
machine that others use, a figure holds for as long as their load stays what it was. How many cores
they kept busy is shown: while measuring, and during the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mas_batch import pipeline
from mas_batch.job import Job
from mas_batch.job_file import check_job
from mas_batch.latency.phases import ANSWERING
from mas_batch.planning import plan
from mas_batch.planning.sampling import other_programs

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Configuration:
    """A job, and what it is planned from."""

    name: str
    job: Mapping[str, Any]
    """Sections that replace those of `BASE`."""
    source: str
    """File of the bundled data."""
    num_records: int
    num_sampled: int = 48
    former: Mapping[str, Any] | None = None
    """Sections of the job whose run is learned from; None: a sample."""


@dataclass(frozen=True)
class Found:
    """What was predicted and what came."""

    name: str
    measuring_s: float
    predicted_s: float
    measured_s: float
    predicted_answering_s: float
    measured_answering_s: float
    predicted_tokens: int
    measured_tokens: int
    others_before: float
    """Cores that other programs kept busy while the planner measured."""
    others_then: float
    """And during the run."""
    bottleneck: str
    phases: dict[str, list[float]] = field(default_factory=dict)

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1

    @property
    def answering_error(self) -> float:
        return self.predicted_answering_s / self.measured_answering_s - 1


BASE = {"task": {"kind": "summarize", "max_new_tokens": 24}, "merge": {"method": "vote"}}


def echo(name: str, **options: Any) -> dict[str, Any]:
    agent = {key: options.pop(key) for key in ("count", "samples") if key in options}
    return {"name": name, "model": f"echo:{name}", "engine": "echo", "options": options, **agent}


def shipped(file: str, *names: str, **changes: Any) -> dict[str, Any]:
    """Return the task, the agents and the merge of a job in jobs/."""
    raw = yaml.safe_load((ROOT / "jobs" / file).read_text())
    agents = [{**a, **changes} for a in raw["agents"] if not names or a["name"] in names]
    for agent in agents:
        options = dict(agent.get("options", {}))
        if "examples" in options:
            options["examples"] = str((ROOT / "jobs" / options["examples"]).resolve())
        agent["options"] = options
    return {"task": raw["task"], "agents": agents}


LABELS = ["red", "green", "blue"]
PAGES, SENTENCES, MODULES = "help_pages.jsonl", "sentences_en_pt.jsonl", "help_modules.jsonl"
CONFIGURATIONS = (
    Configuration(
        "echo, two hosts, time per batch",
        {"agents": [echo("a", count=2, seconds_per_batch=0.4)], "partition": {"max_records": 8}},
        PAGES,
        800,
    ),
    Configuration(
        "echo, two agents, time per token",
        {
            "agents": [
                echo("slow", count=2, seconds_per_batch=0.1, seconds_per_token=0.04),
                echo("short", seconds_per_token=0.05, words=6),
            ],
            "partition": {"max_records": 16},
        },
        PAGES,
        960,
    ),
    Configuration(
        "echo, two of three unlike agents, throughput",
        {
            "agents": [
                echo("fast", seconds_per_batch=0.2),
                echo("middle", seconds_per_batch=0.4),
                echo("slow", seconds_per_batch=1.0),
            ],
            "routing": {"policy": "throughput", "answers_per_record": 2},
            "partition": {"max_records": 4},
        },
        SENTENCES,
        480,
    ),
    Configuration(
        "echo, adaptive",
        {
            "task": {"kind": "classify", "labels": LABELS, "max_new_tokens": 4},
            "agents": [
                echo(name, labels=LABELS, error_rate=rate, seconds_per_batch=0.3)
                for name, rate in (("a", 0.1), ("b", 0.2), ("c", 0.3), ("d", 0.3))
            ],
            "routing": {"adaptive": {"first": 2}},
            "partition": {"max_records": 4},
        },
        SENTENCES,
        600,
    ),
    Configuration(
        "echo, four hosts by a run of one",
        {
            "agents": [echo("a", count=4, seconds_per_batch=0.3, seconds_per_token=0.04)],
            "partition": {"max_records": 12},
        },
        PAGES,
        1200,
        former={
            "agents": [echo("a", count=1, seconds_per_batch=0.3, seconds_per_token=0.04)],
            "partition": {"max_records": 6, "max_tokens": 1500},
            "corpus": {"limit": 150},
        },
    ),
    Configuration(
        "marian, two hosts",
        {**shipped("translate.yaml", "translator", count=2), "partition": {"max_records": 16}},
        SENTENCES,
        1000,
        num_sampled=128,
    ),
    Configuration(
        "MiniLM kNN and naive Bayes",
        {
            **shipped("classify.yaml", "neighbours", "words"),
            "routing": {"policy": "capability"},
            "partition": {"max_records": 16},
        },
        MODULES,
        960,
        num_sampled=128,
    ),
    Configuration(
        "MiniLM, partitions of 32 by a run with 8",
        {**shipped("classify.yaml", "centroids", count=2), "partition": {"max_records": 32}},
        MODULES,
        1280,
        former={
            **shipped("classify.yaml", "centroids", count=2),
            "partition": {"max_records": 8},
            "corpus": {"limit": 320},
        },
    ),
    Configuration(
        "jobs/classify.yaml: three agents of one encoder, two more",
        {**shipped("classify.yaml"), "partition": {"max_records": 16}},
        MODULES,
        552,
        num_sampled=96,
    ),
    Configuration(
        "jobs/summarize.yaml: two agents of one model",
        {
            **shipped("summarize.yaml"),
            "task": {"kind": "summarize", "max_new_tokens": 32},
            "merge": {"method": "mbr", "utility": "rouge-l"},
            "routing": {"policy": "least-loaded", "answers_per_record": 3},
            "partition": {"max_records": 4},
        },
        PAGES,
        32,
        num_sampled=16,
    ),
    Configuration(
        "SmolLM2 summaries, two hosts",
        {
            **shipped("summarize.yaml", "plain", count=2),
            "task": {"kind": "summarize", "max_new_tokens": 24},
            "partition": {"max_records": 4},
        },
        PAGES,
        48,
        num_sampled=16,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[""], metavar="WORD")
    parser.add_argument("--folder", type=Path, help="of what was found")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for configuration in CONFIGURATIONS:
            kept = folder / f"{configuration.name.replace('/', ' ')}.json"
            if any(word in configuration.name for word in args.only) and not kept.exists():
                kept.write_text(json.dumps(asdict(compare(configuration)), indent=1))
                print(row(Found(**json.loads(kept.read_text()))), flush=True)
            if kept.exists():
                found.append(Found(**json.loads(kept.read_text())))
    print_table(found)


def compare(configuration: Configuration) -> Found:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_corpus(folder / "corpus.jsonl", configuration)
        job = job_of(folder, configuration, configuration.job)
        former = None
        with other_programs() as before:
            if configuration.former is not None:
                sections = {**configuration.job, **configuration.former}
                former = pipeline.run(job_of(folder, configuration, sections)).run
            predicted = plan(job, former=former, num_sampled=configuration.num_sampled)
        with other_programs() as then:
            summary = pipeline.run(job)
        phases = summary.manifest["latency"]["phases"]
        tokens = sum(agent["completion_tokens"] for agent in summary.manifest["agents"])
        both = {
            name: [round(predicted.phases.get(name, 0.0), 2), round(phases.get(name, 0.0), 2)]
            for name in predicted.phases | phases
        }
        return Found(
            name=configuration.name,
            measuring_s=predicted.measuring_s,
            predicted_s=predicted.own.duration_s,
            measured_s=summary.wall_s,
            predicted_answering_s=predicted.phases[ANSWERING],
            measured_answering_s=phases[ANSWERING],
            predicted_tokens=sum(agent.completion_tokens for agent in predicted.agents),
            measured_tokens=tokens,
            others_before=before.num_cores,
            others_then=then.num_cores,
            bottleneck=predicted.bottleneck.what,
            phases=both,
        )


def job_of(folder: Path, configuration: Configuration, sections: Mapping[str, Any]) -> Job:
    corpus = {"path": str(folder / "corpus.jsonl"), "id": "id", "text": text_column(configuration)}
    return check_job(
        {
            "name": "bench",
            **BASE,
            **sections,
            "corpus": {**corpus, **sections.get("corpus", {})},
            "output": {"path": str(folder / "runs")},
            "cluster": {"dashboard_address": None},
        }
    )


def write_corpus(path: Path, configuration: Configuration) -> None:
    """Write the bundled texts, and again with a number before them: an encoder remembers texts."""
    lines = (ROOT / "data" / configuration.source).read_text().splitlines()
    text = text_column(configuration)
    with path.open("w") as file:
        for number in range(configuration.num_records):
            row = json.loads(lines[number % len(lines)])
            if number >= len(lines):
                row[text] = f"{number // len(lines) + 1}. {row[text]}"
            file.write(json.dumps({**row, "id": f"r{number}"}) + "\n")


def text_column(configuration: Configuration) -> str:
    return "en" if configuration.source == SENTENCES else "text"


def row(found: Found) -> str:
    cells = (
        found.name,
        f"{found.measuring_s:.0f}",
        f"{found.predicted_s:.1f}",
        f"{found.measured_s:.1f}",
        f"{found.error:+.0%}",
        f"{found.predicted_answering_s:.1f} / {found.measured_answering_s:.1f}",
        f"{found.answering_error:+.0%}",
        f"{found.predicted_tokens:,} / {found.measured_tokens:,}",
        f"{found.others_before:.1f} / {found.others_then:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def print_table(found: list[Found]) -> None:
    header = (
        "run", "sample s", "predicted s", "measured s", "error",
        "answering, predicted / measured s", "error", "new tokens, predicted / measured",
        "cores of others, before / then",
    )  # fmt: skip
    print(f"\n| {' | '.join(header)} |")
    print("|---" * len(header) + "|")
    for each in found:
        print(row(each))
    kinds: tuple[tuple[str, Callable[[Found], float]], ...] = (
        ("whole run", lambda each: abs(each.error)),
        ("answering", lambda each: abs(each.answering_error)),
    )
    for kind, error_of in kinds:
        errors = [error_of(each) for each in found]
        print(f"\n{kind}: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
