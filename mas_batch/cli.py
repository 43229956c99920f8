"""The command line: `mas-batch …`, `dask mas-batch …` and `python -m mas_batch.submit`.

Each command imports what it runs, so that a help text does not wait for Dask and pandas.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from mas_batch import __version__
from mas_batch.errors import ExitCode, MasBatchError
from mas_batch.registries import METHODS
from mas_batch.safe_text import printable, without_credentials

if TYPE_CHECKING:
    from mas_batch.events import Event
    from mas_batch.job import Job
    from mas_batch.monitor.progress import Throughput
    from mas_batch.pipeline import Summary

EXIT_CODES = """\b
Exit codes:
  0  every record is answered, or no more failed than output.max_failed_fraction
  1  the run failed; what is answered is kept: the same command resumes
  2  the job is wrong; no agent was asked
  3  finished, with more failed records than output.max_failed_fraction
  4  another process works on this run or, with `since: last`, on this job; nothing was done
"""


@click.group("mas-batch")  # the name under which `dask` lists it
@click.version_option(__version__, prog_name="mas-batch")
def main() -> None:
    """Batch text processing by many LLM agents on Dask."""


def _clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors that we raise on purpose into one line and their exit code."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        code = ExitCode.RUN_FAILED
        try:
            command(*args, **kwargs)
            return
        except MasBatchError as error:
            words, code = str(error), error.exit_code
        except OSError as error:  # a disk or a network, whose words are clear enough
            words = without_credentials(f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            words = "interrupted; the same command resumes"
        click.echo(printable(f"mas-batch: {words}"), err=True)
        sys.exit(code)

    return wrapper


@main.command(epilog=EXIT_CODES)
@click.argument("job_file", metavar="JOB.yaml")
@click.option(
    "--set", "overrides", metavar="KEY.PATH=VALUE", multiple=True, help="Override a key of the job."
)
@click.option("--dry-run", is_flag=True, help="Print the plan and run nothing.")
@click.option(
    "--retry-failed",
    is_flag=True,
    help="Ask again for what failed in the published run, and publish a new version of it.",
)
@click.option(
    "--scheduler", metavar="ADDRESS", help="Use this Dask scheduler (tcp://… or tls://…)."
)
@click.option("--scheduler-file", metavar="FILE", help="Use the Dask scheduler of this file.")
@click.option("--output", metavar="PATH", help="Folder or URL for runs, instead of output.path.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a machine-readable summary on stdout, nothing else.",
)
@click.option(
    "--show", "num_shown", default=5, show_default=True, help="Records to show at the end."
)
@_clear_errors
def submit(
    job_file: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    retry_failed: bool,
    scheduler: str | None,
    scheduler_file: str | None,
    output: str | None,
    as_json: bool,
    num_shown: int,
) -> None:
    """Run a job, or what is left of it.

    The same job on the same corpus is the same run: a run that was cut short goes on where it
    stopped, a complete one is only shown, and a changed job starts a run of its own.
    """
    from mas_batch import pipeline, show
    from mas_batch.job_file import load_job
    from mas_batch.monitor.progress import Throughput

    flags = {"output.path": output}
    if scheduler or scheduler_file:
        flags |= {"cluster.scheduler": scheduler, "cluster.scheduler_file": scheduler_file}
    given = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in flags.items()
        if value or key.startswith("cluster.")
    ]
    job = load_job(job_file, [*overrides, *given])
    out = Console(soft_wrap=False, stderr=as_json)
    if dry_run and retry_failed:
        raise click.UsageError("--dry-run and --retry-failed do not go together")
    if dry_run:
        plan = pipeline.preview(job)
        if as_json:
            click.echo(json.dumps(show.preview_facts(job, plan), ensure_ascii=False))
        else:
            show.print_preview(out, job, plan)
        return
    throughput = Throughput()
    summary = _run(job, throughput, retry_failed=retry_failed)
    if as_json:
        click.echo(json.dumps(show.summary_facts(job, summary, throughput), ensure_ascii=False))
    else:
        show.print_summary(out, job, summary, throughput, num_shown)
    sys.exit(summary.exit_code)


class _LogLine(logging.Formatter):
    """A line of the log; files' names and models' words in it cannot steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(without_credentials(super().format(record)))


def _run(job: Job, throughput: Throughput, *, retry_failed: bool) -> Summary:
    from mas_batch import pipeline
    from mas_batch.monitor.progress import Bar, LogLines

    # Slurm, Kubernetes and systemd end a job with SIGTERM: leave as on Ctrl-C, workers first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        readers: list[Callable[[Event], None]] = [throughput]
        if sys.stderr.isatty():
            readers.append(stack.enter_context(Bar(Console(stderr=True, log_path=False))))
        else:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(_LogLine("%(asctime)s %(levelname)s %(name)s %(message)s"))
            logging.basicConfig(handlers=[handler])
            logging.getLogger("mas_batch").setLevel(logging.INFO)
            readers.append(LogLines())

        def emit(event: Event) -> None:
            for reader in readers:
                reader(event)

        return pipeline.run(job, emit=emit, retry_failed=retry_failed)


@main.command("show")
@click.argument("run")
@click.option("--records", "num_shown", default=10, show_default=True, help="Records to show.")
@_clear_errors
def show_run(run: str, num_shown: int) -> None:
    """Show the results of a published run."""
    from mas_batch import show
    from mas_batch.run_folder.read import open_run

    show.print_run(Console(), open_run(run), num_shown)


@main.command("report")
@click.argument("run")
@click.option("--output", metavar="FILE", help="Write it there instead of into the run.")
@click.option("--all", "whole", is_flag=True, help="Read every record, however many there are.")
@_clear_errors
def report_run(run: str, output: str | None, whole: bool) -> None:
    """Write report.html into a published run: one page that opens anywhere, without a network."""
    from mas_batch import report
    from mas_batch.run_folder.read import open_run

    opened = open_run(run)
    if output is None:
        location = report.write(opened, whole=whole)
    else:
        Path(output).write_bytes(report.render(report.collect(opened, whole=whole)))
        location = output
    click.echo(f"report: {location}")


@main.command("compare")
@click.argument("run_a", metavar="RUN")
@click.argument("run_b", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print it for machines.")
@click.option("--records", "num_shown", default=10, show_default=True, help="Records to show.")
@_clear_errors
def compare_runs(run_a: str, run_b: str, as_json: bool, num_shown: int) -> None:
    """Say how two published runs differ: job, models, quality, time, and record by record.

    Runs on other corpora are compared on the records whose ids both have.
    """
    from mas_batch import compare
    from mas_batch.run_folder.read import open_run

    found = compare.compare(open_run(run_a), open_run(run_b), num_shown=num_shown)
    if as_json:
        click.echo(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        compare.print_comparison(Console(), found)


@main.command("explain")
@click.argument("run")
@click.argument("partition", type=int, required=False)
@click.option(
    "--record", "record_id", metavar="ID", help="Explain the partition of this record (a scan)."
)
@click.option("--json", "as_json", is_flag=True, help="Print it for machines.")
@_clear_errors
def explain_partition(
    run: str, partition: int | None, record_id: str | None, as_json: bool
) -> None:
    """Say who was asked about a partition, when, why, and what came of it.

    The figures are those that the routing policy saw. RUN need not be complete.
    """
    from mas_batch import explain
    from mas_batch.run_folder.storage import Store

    store = Store(run)
    if partition is None and record_id is not None:
        partition = explain.find_record(store, record_id)
    elif partition is None or record_id is not None:
        raise click.UsageError("give either PARTITION or --record ID")
    explanation = explain.explain(store, partition)
    if as_json:
        click.echo(json.dumps(explain.to_json(explanation), ensure_ascii=False))
    else:
        explain.print_explanation(Console(), explanation)


@main.command("merge")
@click.argument("run")
@click.option("--method", type=click.Choice(tuple(METHODS)), help="How to merge.")
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True,
    help="Override a key of the job's merge section, such as utility=bleu.",
)  # fmt: skip
@click.option("--name", help="Of the merge; else the method and a hash of the section.")
@click.option("--scheduler", metavar="ADDRESS", help="Use this Dask scheduler.")
@click.option("--json", "as_json", is_flag=True, help="Print a machine-readable summary.")
@click.option("--records", "num_shown", default=10, show_default=True, help="Records to show.")
@_clear_errors
def merge_command(
    run: str,
    method: str | None,
    overrides: tuple[str, ...],
    name: str | None,
    scheduler: str | None,
    as_json: bool,
    num_shown: int,
) -> None:
    """Merge a run's answers again, without asking any agent again.

    The run stays as it is; the merge is kept beside it, in merges/.
    """
    from mas_batch import cluster, remerge, show
    from mas_batch.job import Cluster
    from mas_batch.job_file import parse_overrides
    from mas_batch.run_folder.read import open_run

    changes = parse_overrides(overrides) | ({"method": method} if method else {})
    opened = open_run(run)
    with ExitStack() as stack:
        client = None
        if scheduler:
            settings = Cluster(scheduler=scheduler)
            client = stack.enter_context(cluster.connect_to_scheduler(settings))
        merged = remerge.merge_again(opened, changes, name=name, client=client, emit=_tell)
    if as_json:
        click.echo(json.dumps(show.merge_facts(merged), ensure_ascii=False))
    else:
        show.print_run(Console(), merged, num_shown)


@main.command()
@click.argument("run")
@click.option(
    "--count", type=click.IntRange(min=1), default=100, show_default=True,
    help="Rows; 50 at least, 400 for a good calibration.",
)  # fmt: skip
@click.option("--merge", "name", help="Of this merge of the run, instead of the run's own.")
@click.option(
    "--output", default="labels.csv", show_default=True, metavar="FILE",
    help="Ends in .csv, .parquet or .jsonl.",
)  # fmt: skip
@_clear_errors
def label(run: str, count: int, name: str | None, output: str) -> None:
    """Write the records that are most worth labelling, for merge.calibrate.

    Fill in the column `label`; then: mas-batch merge RUN --set calibrate.labels=FILE
    """
    from mas_batch import labelling
    from mas_batch.run_folder.read import open_run

    opened = open_run(run)
    rows = labelling.rows_to_label(opened.merge(name) if name else opened, count)
    labelling.write_rows(rows, output)
    click.echo(f"{rows.num_rows} rows in {output}: fill in the column `label`, then")
    shown = f"mas-batch merge {run} --set calibrate.labels={output}"
    click.echo(printable(without_credentials(shown)))


def _tell(event: Event) -> None:
    from mas_batch.monitor.progress import sentence

    if line := sentence(event):
        Console(stderr=True).print(line)


@main.command()
@click.argument("run")
@click.option(
    "--reference", default="reference", show_default=True, metavar="COLUMN",
    help="Column of the corpus that holds the right answers.",
)  # fmt: skip
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(tuple(METHODS)),
    help="Judge these methods only; may be repeated. Else all that fit the answers.",
)  # fmt: skip
@click.option("--resamples", default=1000, show_default=True, help="Of the paired bootstrap.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--compare", multiple=True, metavar="RUN", help="The same job with other hosts: speed-up."
)
@click.option("--json", "as_json", is_flag=True, help="Print it for machines.")
@_clear_errors
def evaluate(
    run: str,
    reference: str,
    methods: tuple[str, ...],
    resamples: int,
    seed: int,
    compare: tuple[str, ...],
    as_json: bool,
) -> None:
    """Judge a run's agents and merges by its references: quality, agreement, cost, calibration."""
    from mas_batch import evaluation, report
    from mas_batch.run_folder.read import open_run

    opened = open_run(run)
    found = evaluation.evaluate(
        opened,
        reference,
        methods=methods or None,
        num_resamples=resamples,
        seed=seed,
        compare=[open_run(other) for other in compare],
        merges={name: opened.merge(name).arrow() for name in opened.merges()},
    )
    evaluation.write(found, opened.store)
    report.write(opened)
    if as_json:
        click.echo(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        evaluation.print_evaluation(Console(), found)


@main.command("plan")
@click.argument("job_file", metavar="JOB.yaml")
@click.option("--from", "former", metavar="RUN", help="Learn from this run instead of a sample.")
@click.option(
    "--sample", "num_sampled", type=click.IntRange(min=1), default=64, show_default=True,
    help="Records that every agent is asked about first.",
)  # fmt: skip
@click.option("--deadline", metavar="TIME", help="2h, 90m, 3600: how few hosts are in time?")
@click.option("--hosts", metavar="N-M", help="Of each agent, to look at; else 1-4 or more.")
@click.option(
    "--set", "overrides", metavar="KEY.PATH=VALUE", multiple=True, help="Override a key of the job."
)
@click.option("--json", "as_json", is_flag=True, help="Print it for machines.")
@_clear_errors
def plan_job(
    job_file: str,
    former: str | None,
    num_sampled: int,
    deadline: str | None,
    hosts: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Predict a run before it runs: how long, how many tokens, what it waits for, what helps.

    A small sample of the corpus is answered first, or a former run is learned from; the rest is
    a simulation with the real dispatcher.
    """
    from mas_batch import planning
    from mas_batch.job_file import load_job

    job = load_job(job_file, overrides)
    predicted = planning.plan(
        job,
        former=former,
        num_sampled=num_sampled,
        deadline_s=planning.parse_deadline(deadline) if deadline else None,
        hosts=planning.parse_hosts(hosts) if hosts else None,
        tell=lambda line: click.echo(line, err=True),
    )
    if as_json:
        click.echo(json.dumps(planning.to_json(predicted), ensure_ascii=False))
    else:
        planning.print_plan(Console(), predicted)


@main.command()
@click.argument("job_files", metavar="JOB.yaml...", nargs=-1, required=True)
@_clear_errors
def fetch(job_files: tuple[str, ...]) -> None:
    """Fetch and verify the models of jobs, adapters and encoders too: a run then starts at once."""
    from mas_batch import models
    from mas_batch.job_file import load_job

    jobs = [load_job(file) for file in job_files]
    agents = [agent for job in jobs for agent in job.agents]
    wanted = [source for agent in agents for source in (agent.model, agent.adapter) if source]
    wanted += [job.merge.encoder for job in jobs if job.merge.encoder]
    for source in dict.fromkeys(wanted):
        files = models.fetch(source)
        click.echo(f"{files.family_id}  {files.path or files.scheme}  sha256 {files.sha256 or '-'}")


if __name__ == "__main__":
    main()
