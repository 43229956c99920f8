"""Every panel and alert of `dashboards/`, against a real Prometheus that scrapes a real run."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import Client

from mas_batch.monitor.dashboard.plugin import AgentsDashboard
from tests.test_dashboard import Background, MakeJob, dashboard, slow_agents, wait_for
from tests.waiting import PATIENCE_S

__all__ = ["dashboard"]  # a fixture

DASHBOARDS = Path(__file__).parents[1] / "dashboards"
PANELS = sorted((DASHBOARDS / "grafana").glob("*.json"))

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no prometheus with promtool on the PATH (Debian: apt install prometheus)",
)


class Prometheus:
    """A server that scrapes one address every second."""

    def __init__(self, folder: Path, target: str) -> None:
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(DASHBOARDS / "alerts.yaml")],
            "scrape_configs": [{"job_name": "dask", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address={self._address}",
            ],
            stdout=self._log,
            stderr=self._log,
        )

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        self._log.close()

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an API call; None while the server is starting."""
        query = urllib.parse.urlencode(parameters)
        try:
            url = f"http://{self._address}/api/v1/{path}?{query}"
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply:
                return json.load(reply)["data"]
        except (urllib.error.URLError, ConnectionError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 400:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from error
            return None

    def query(self, expression: str) -> list[dict[str, Any]]:
        found = self.get("query", query=expression)
        return found["result"] if found else []


@pytest.fixture
def prometheus(dashboard: tuple[Client, str], tmp_path: Path) -> Iterator[Prometheus]:
    client, base = dashboard
    client.register_plugin(AgentsDashboard())
    server = Prometheus(tmp_path, base.removeprefix("http://"))
    yield server
    server.close()


def panels() -> list[tuple[str, str, str]]:
    """Return (title, expression, legend) of every panel, its variables filled in."""
    found = []
    for file in PANELS:
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                filled = target["expr"].replace("$__rate_interval", "1m").replace("$run", ".*")
                assert "$" not in filled, f"{panel['title']}: {filled}"
                found.append((panel["title"], filled, target["legendFormat"]))
    return found


@needs_prometheus
def test_every_panel_and_rule_has_an_answer_from_a_real_run(
    prometheus: Prometheus, dashboard: tuple[Client, str], make_job: MakeJob
) -> None:
    client, _ = dashboard
    wait_for(lambda: prometheus.query("up == 1"))
    rows = [{"id": f"r{i}", "text": f"text number {i}"} for i in range(30)]
    with Background(make_job(rows, agents=slow_agents(0.5)), client):
        wait_for(lambda: prometheus.query('mas_batch_hosts{state="busy"} > 0'))
        wait_for(lambda: prometheus.query('mas_batch_partitions{state="merged"} > 2'))
    wait_for(lambda: prometheus.query('mas_batch_run_status{status="finished"} == 1'))
    assert prometheus.query("mas_batch_records_merged_total")[0]["value"][1] == "30"
    checked = panels()
    assert len(checked) >= 18
    for title, expression, legend in checked:
        answer = prometheus.query(expression)
        assert answer, f"panel {title!r} is empty: {expression}"
        for label in re.findall(r"{{(\w+)}}", legend):
            assert label in answer[0]["metric"], f"panel {title!r} has no label {label}"
        assert all(row["value"][1] != "NaN" for row in answer), f"panel {title!r}: {answer}"
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 8
    assert {(rule["health"], rule["state"]) for rule in rules} == {("ok", "inactive")}


@needs_prometheus
def test_every_rule_names_metrics_that_exist_and_fires_when_it_should() -> None:
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=DASHBOARDS, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    tested = (DASHBOARDS / "alerts_test.yaml").read_text()
    rules = yaml.safe_load((DASHBOARDS / "alerts.yaml").read_text())["groups"][0]["rules"]
    for rule in rules:
        alert = re.search(rf"alertname: {rule['alert']}\n +exp_alerts:\n", tested)
        assert alert, f"no test has {rule['alert']} fire"


def test_panels_rules_and_docs_name_the_metrics_that_we_serve() -> None:
    from mas_batch.monitor.dashboard.metrics import families
    from mas_batch.monitor.inbox import Inbox

    served = set()
    for family in families([Inbox()], 0.0):
        served.add(family.name + "_total" * (family.type == "counter"))
    files = [*PANELS, DASHBOARDS / "alerts.yaml", DASHBOARDS / "alerts_test.yaml"]
    documented = DASHBOARDS.parent / "docs" / "dashboards.md"
    assert served == set(re.findall(r"`(mas_batch_\w+)`", documented.read_text()))
    for file in files:
        used = set(re.findall(r"\bmas_batch_\w+", file.read_text())) - {"mas_batch"}
        assert used <= served, f"{file.name}: {used - served}"
        assert used


def test_the_dashboard_can_be_imported_into_any_grafana() -> None:
    for file in PANELS:
        dashboard = json.loads(file.read_text())
        variables = {each["name"]: each["type"] for each in dashboard["templating"]["list"]}
        assert variables == {"datasource": "datasource", "run": "query"}
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(ids)) == len(ids)
        for panel in dashboard["panels"]:
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["description"]
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
