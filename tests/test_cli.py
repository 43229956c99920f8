"""The command line as people call it: exit codes, messages, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mas_batch.cli import main
from tests.test_models import safetensors
from tests.waiting import PATIENCE_S

JOB = {
    "name": "cli",
    "corpus": {"path": "corpus.jsonl"},
    "task": {"kind": "summarize", "max_new_tokens": 5},
    "agents": [{"name": "a", "model": "echo:a"}, {"name": "b", "model": "echo:b"}],
    "merge": {"method": "vote"},
    "partition": {"max_records": 4},
    "output": {"path": "runs"},
    "cluster": {"dashboard_address": None},
}


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    rows = [{"text": f"record {i} has a few words"} for i in range(10)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(JOB))
    return file


def submit(
    job_file: Path, *options: str, module: str = "mas_batch.submit"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *(["submit"] if module == "mas_batch" else [])]
    return subprocess.run(
        [*command, str(job_file), *options],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_help_imports_nothing_that_only_a_run_needs() -> None:
    heavy = ("bokeh", "dask", "distributed", "jinja2", "numpy", "pandas", "pyarrow", "torch")
    code = f"""
import sys
from mas_batch.cli import main
main(["submit", "--help"], standalone_mode=False)
print(sorted(set({heavy!r}).intersection(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert "Run a job, or what is left of it." in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_job_runs_on_an_embedded_cluster_and_again_does_nothing(job_file: Path) -> None:
    first = submit(job_file, "--json")
    assert first.returncode == 0, first.stderr
    facts = json.loads(first.stdout)
    assert facts["counts"]["results"] == 10
    assert facts["already_complete"] is False
    assert "event=run_started" in first.stderr
    assert "event=run_finished" in first.stderr
    again = submit(job_file)
    assert again.returncode == 0, again.stderr
    assert "answered already" in again.stdout
    assert "10 records in, 10 answered, 0 failed" in again.stdout
    shown = CliRunner().invoke(main, ["show", facts["run"], "--records", "2"])
    assert shown.exit_code == 0
    assert "record 1 has" in shown.output


def test_too_many_failed_records_is_exit_code_3(job_file: Path) -> None:
    fault = "agents.0.options={faults: {record 1: error}}"
    failed = submit(
        job_file, "--set", fault, "--set", "agents=[{name: a, model: echo}]", "--set", fault
    )
    assert failed.returncode == 3, failed.stderr
    assert "1 records failed: engine_error" in failed.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "routing.policy=x"], "routing.policy: 'x' is not allowed; allowed: capability"),
        (["--set", "corpus.path=nowhere/*.jsonl"], "corpus.path"),
        (["--set", "corpus.text=body"], "corpus.text"),
        (["--scheduler-file", "nowhere.json"], "cluster.scheduler_file"),
        (["--output", "nonsense://x"], "output.path"),
    ],
)
def test_a_wrong_job_is_exit_code_2_and_one_line(
    job_file: Path, options: list[str], words: str
) -> None:
    result = CliRunner().invoke(main, ["submit", str(job_file), *options])
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(job_file.parent.glob("runs/*"))


@pytest.mark.usefixtures("short_connect")
def test_an_unreachable_scheduler_is_exit_code_1(job_file: Path) -> None:
    result = CliRunner().invoke(main, ["submit", str(job_file), "--scheduler", "tcp://127.0.0.1:1"])
    assert result.exit_code == 1
    assert "cannot be reached" in result.stderr


def test_dry_run_plans_and_writes_nothing(job_file: Path) -> None:
    result = CliRunner().invoke(main, ["submit", str(job_file), "--dry-run"])
    assert result.exit_code == 0
    assert "10 records (0 unusable)" in result.output
    assert "3 partitions" in result.output
    as_json = CliRunner().invoke(main, ["submit", str(job_file), "--dry-run", "--json"])
    assert json.loads(as_json.stdout)["num_partitions"] == 3
    assert not (job_file.parent / "runs").exists()


def test_dry_run_shows_hosts_once_for_all_agents_that_share_them(job_file: Path) -> None:
    agents = [{"name": name, "model": "echo:same"} for name in ("a", "b")]
    agents += [{"name": "c", "model": "echo:other", "count": 2, "max_count": 3}]
    job_file.write_text(yaml.safe_dump({**JOB, "agents": agents}))
    shown = CliRunner().invoke(main, ["submit", str(job_file), "--dry-run"]).output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    hosts = {row[0]: row[3] for row in rows if len(row) == 5}
    assert hosts == {"a": "1", "b": "with a", "c": "2 to 3"}
    as_json = CliRunner().invoke(main, ["submit", str(job_file), "--dry-run", "--json"])
    posts = json.loads(as_json.stdout)["posts"]
    assert [(post["agents"], post["hosts"], post["most"]) for post in posts] == [
        (["a", "b"], 1, 1), (["c"], 2, 3),
    ]  # fmt: skip


def test_all_three_entry_points_are_one_command() -> None:
    outputs = [
        subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
        for command in (
            [sys.executable, "-m", "mas_batch.submit"],
            [sys.executable, "-m", "mas_batch", "submit"],
            [str(Path(sys.executable).parent / "mas-batch"), "submit"],
            [str(Path(sys.executable).parent / "dask"), "mas-batch", "submit"],
        )
    ]
    # Line breaks depend on the length of the program's name; `dask` gives its commands `-h` too.
    texts = (output.partition("Run a job")[2].replace("-h,", "") for output in outputs)
    bodies = {" ".join(text.split()) for text in texts}
    assert len(bodies) == 1
    assert "Exit codes" in bodies.pop()


def test_fetch_names_the_model(job_file: Path) -> None:
    result = CliRunner().invoke(main, ["fetch", str(job_file)])
    assert result.exit_code == 0
    assert "echo" in result.output


def test_fetch_fetches_the_encoder_of_the_merge_too(tmp_path: Path, job_file: Path) -> None:
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "model.safetensors").write_bytes(safetensors(b"\0" * 4))
    merge = {"method": "mbr", "utility": "embedding", "encoder": str(encoder)}
    job_file.write_text(yaml.safe_dump({**JOB, "merge": merge}))
    result = CliRunner().invoke(main, ["fetch", str(job_file)])
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) == 3
    assert str(encoder) in result.output


def test_the_command_line_imports_no_model_library() -> None:
    """A submitting machine and a scheduler need none, and torch alone takes seconds to import."""
    heavy = ["torch", "transformers", "ctranslate2", "openai", "sacrebleu", "rouge_score"]
    code = f"import sys, mas_batch.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
