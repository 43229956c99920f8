"""A cluster over TLS, started by the page's own lines: who is let in, and who is not."""

from __future__ import annotations

import json
import shlex
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import dask
import pytest
from distributed import Client, Security

import mas_batch
from mas_batch import cluster, pipeline
from mas_batch.agents.spec import agent_specs
from mas_batch.errors import JobError, RunError
from mas_batch.job import Job
from mas_batch.job_file import load_job
from tests.chaos import started
from tests.recipes import BIN, DEPLOY, ROOT, block, tool, write_job
from tests.waiting import PATIENCE_S

LOOPBACK = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
FILES = {"tls_ca_file": "ca.pem", "tls_cert": "cert.pem", "tls_key": "key.pem"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where the page's lines have made certificates and started scheduler and worker."""
    tool("openssl", "apt-get install openssl")
    folder = tmp_path_factory.mktemp("tls")
    (folder / "docs").symlink_to(ROOT / "docs")
    certificates, scheduler, worker, _ = block("TLS", "sh").splitlines()
    subprocess.run(shlex.split(certificates), cwd=folder, check=True)
    with ExitStack() as stack:
        log = folder / "cluster.log"
        for line, own in ((scheduler, ["--port", "0"]), (worker, ["--nthreads", "3"])):
            command = ["-m", *shlex.split(line), *LOOPBACK, *own]
            child = stack.enter_context(started(command, log, cwd=folder))
            deadline = time.monotonic() + PATIENCE_S
            while not (folder / "cluster.json").exists():
                assert child.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield folder


@pytest.fixture
def address(folder: Path) -> str:
    found: str = json.loads((folder / "cluster.json").read_text())["address"]
    assert found.startswith("tls://127.0.0.1:")
    return found


def security(certificates: Path) -> Security:
    return Security(
        require_encryption=True,
        tls_ca_file=str(certificates / "ca.pem"),
        tls_client_cert=str(certificates / "cert.pem"),
        tls_client_key=str(certificates / "key.pem"),
    )


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> Job:
    settings = [f"cluster.{key}={folder / 'certs' / name}" for key, name in FILES.items()]
    return load_job(write_job(tmp_path), settings)


def test_the_pages_command_runs_a_job(folder: Path, address: str) -> None:
    write_job(folder)
    *_, line = block("TLS", "sh").splitlines()
    words = shlex.split(line)
    done = subprocess.run(
        [str(BIN / words[0]), *words[1:], "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["counts"]["results"] == 12
    workers = set(mas_batch.open_run(facts["run"]).arrow("answers")["worker"].to_pylist())
    assert all(worker.startswith("tls://") for worker in workers)


def test_one_of_its_own_is_let_in(folder: Path, address: str) -> None:
    with Client(address, security=security(folder / "certs"), set_as_default=False) as client:
        assert client.submit(lambda: 1).result(timeout=PATIENCE_S) == 1


@pytest.mark.parametrize("stranger", ["plaintext", "another CA's"])
def test_strangers_are_refused(folder: Path, tmp_path: Path, address: str, stranger: str) -> None:
    certificates, secured = tmp_path / "stranger", None
    if stranger == "plaintext":
        address = address.replace("tls://", "tcp://")
    else:
        subprocess.run(["sh", str(DEPLOY / "certificates.sh"), str(certificates)], check=True)
        secured = security(certificates)
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
        pytest.raises(OSError, match=r"Timed out|closed|certificate"),
    ):
        Client(address, security=secured, timeout="2s", set_as_default=False)


def test_a_client_without_a_certificate_is_refused(folder: Path, address: str) -> None:
    """Dask's own client does not even try; a stranger's might."""
    context = ssl.create_default_context(cafile=str(folder / "certs/ca.pem"))
    context.check_hostname = False
    where = urlsplit(address)
    with (
        socket.create_connection((where.hostname, where.port), timeout=PATIENCE_S) as plain,
        pytest.raises(ssl.SSLError, match="certificate required"),
        context.wrap_socket(plain) as secured,
    ):
        secured.recv(1)


@pytest.mark.parametrize("scheme", ["tls", "tcp"])
def test_settings_that_do_not_fit_the_address_are_a_wrong_job(
    job: Job, address: str, scheme: str
) -> None:
    files = dict.fromkeys(FILES) if scheme == "tls" else {}
    where = address.replace("tls://", f"{scheme}://")
    settings = job.cluster.model_copy(update={"scheduler": where, **files})
    with pytest.raises(JobError, match=r"cluster\.scheduler: .*(TLS configuration|encryption)"):
        pipeline.run(job.model_copy(update={"cluster": settings}))


def test_a_job_with_another_cas_certificate_is_told_so(
    tmp_path: Path, job: Job, address: str
) -> None:
    stranger = tmp_path / "stranger"
    subprocess.run(["sh", str(DEPLOY / "certificates.sh"), str(stranger)], check=True)
    files = {key: str(stranger / name) for key, name in FILES.items()}
    wrong = job.model_copy(
        update={"cluster": job.cluster.model_copy(update={"scheduler": address, **files})}
    )
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
        pytest.raises(RunError, match=r"the scheduler at tls://.* cannot be reached"),
    ):
        pipeline.run(wrong)


@pytest.mark.parametrize("missing", FILES)
def test_all_three_files_or_none(job: Job, missing: str) -> None:
    settings = job.cluster.model_copy(update={missing: None})
    with pytest.raises(JobError, match=f"^cluster.{missing}: is needed too, beside tls_"):
        pipeline.run(job.model_copy(update={"cluster": settings}))


def test_the_embedded_cluster_can_be_encrypted_too(job: Job) -> None:
    specs = agent_specs(job, embedded=True, num_cores=2)
    with cluster.connect(job, specs, "test") as connection:
        workers = connection.client.scheduler_info()["workers"]
        assert all(address.startswith("tls://127.0.0.1:") for address in workers)
        assert connection.client.submit(lambda: 1).result(timeout=PATIENCE_S) == 1
    assert pipeline.run(job).manifest["counts"]["results"] == 12
