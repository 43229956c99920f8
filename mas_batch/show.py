"""What people see: tables in the terminal and the JSON summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mas_batch import report
from mas_batch.agents.posts import posts_of
from mas_batch.errors import Reason
from mas_batch.incremental.since_facts import since_facts, since_lines
from mas_batch.job import Job
from mas_batch.monitor.progress import Throughput
from mas_batch.pipeline import Preview, Summary
from mas_batch.run_folder.read import Run, open_run
from mas_batch.safe_text import clip, printable, without_credentials
from mas_batch.terminal import plain_table


def preview_facts(job: Job, plan: Preview) -> dict[str, Any]:
    """Return the dry run as plain data."""
    agents = [
        {
            "name": a.name,
            "model": a.model,
            "count": a.count,
            "samples": a.samples,
            "needs": job.capabilities(a),
        }
        for a in job.agents
    ]
    facts = {**asdict(plan), "run": without_credentials(plan.run)}
    posts = [
        {"post": p.name, "agents": p.agents, "hosts": p.wanted, "most": p.most, "needs": p.needs}
        for p in posts_of(job)
    ]
    own = {"job": job.name, "policy": job.routing.policy}
    return {**own, **facts, "agents": agents, "posts": posts}


def print_preview(out: Console, job: Job, plan: Preview) -> None:
    """Print what a run would do."""
    out.print(
        f"[bold]{job.name}[/]: {job.task.kind}, {plan.answers_per_record} answers per record, "
        f"routed by {job.routing.policy}"
    )
    state = "exists and would be resumed" if plan.exists else "would be new"
    run = without_credentials(plan.run)
    out.print(f"run {run} {state}", soft_wrap=True, markup=False)
    for earlier in plan.earlier_runs:
        out.print(f"the job or its corpus changed since run {earlier}")
    out.print(
        f"{plan.num_records:,} records ({plan.num_unusable:,} unusable), {plan.num_files:,} files "
        f"→ {plan.num_partitions:,} partitions, about {plan.estimated_tokens:,} tokens per answer"
    )
    agents = {agent.name: agent for agent in job.agents}
    table = Table("agent", "answers", "model", "hosts", "each worker declares")
    for post in posts_of(job):
        for name in post.agents:
            shared, needs = f"with {post.agents[0]}", ""
            if name == post.agents[0]:
                shared = f"{post.wanted}" + f" to {post.most}" * (post.most > post.wanted)
                needs = ", ".join(f"{key}={amount:g}" for key, amount in post.needs.items())
            model = agents[name].model.partition("#")[0]
            table.add_row(name, str(agents[name].samples), model, shared, needs)
    out.print(table)


def summary_facts(job: Job, summary: Summary, throughput: Throughput) -> dict[str, Any]:
    """Return the outcome of a run as plain data."""
    manifest = summary.manifest
    looked_back = job.since or manifest.get("since")
    since = since_facts(manifest, nothing_new=summary.already_complete) if looked_back else None
    places = (*manifest.get("engines", {}).values(), manifest["merge"])
    warnings = [warning for place in places for warning in place.get("warnings", ())]
    return {
        "job": job.name,
        "run": without_credentials(summary.run),
        "exit_code": summary.exit_code,
        "already_complete": summary.already_complete,
        "wall_s": round(summary.wall_s, 3),
        "records_per_s": round(throughput.per_second(throughput.records), 3),
        "completion_tokens_per_s": round(throughput.per_second(throughput.completion_tokens), 3),
        "counts": manifest["counts"],
        "agents": manifest["agents"],
        "warnings": list(dict.fromkeys(warnings)),
        **({} if job.routing.adaptive is None else {"answers_saved": answers_saved(job, manifest)}),
        **({} if since is None else {"since": since}),
    }


def answers_saved(job: Job, manifest: Mapping[str, Any]) -> float:
    """Return which share of the answers a job with fixed `answers_per_record` would have asked for
    an adaptive one did without."""
    counts = manifest["counts"]
    unusable = sum(
        count
        for reason, count in counts["failures_by_reason"].items()
        if Reason(reason).stage == "corpus"
    )
    fixed = job.answers_per_record * (counts["results"] + counts["failures"] - unusable)
    asked = sum(agent["answers"] + agent["failed_answers"] for agent in manifest["agents"])
    return round(1 - asked / fixed, 4) if fixed else 0.0


def print_summary(
    out: Console, job: Job, summary: Summary, throughput: Throughput, num_shown: int
) -> None:
    """Print a few records, the agents, where the results are, and the line of totals."""
    if summary.already_complete and job.since:
        counts = summary.manifest["counts"]
        out.print(
            f"Nothing new since {summary.manifest['run']}: {counts['records']:,} records, "
            f"no agent was asked; exit code {summary.exit_code}.",
            style="green",
        )
    elif summary.already_complete:
        out.print("This job is answered already; nothing was asked.", style="green")
    print_run(out, open_run(summary.run, job.output.storage_options), num_shown)
    counts = summary.manifest["counts"]
    total = counts["results"] + counts["failures"]
    answered, failed = counts["results"], counts["failures"]
    line = f"[bold]{total:,} records in, {answered:,} answered, {failed:,} failed[/]"
    if throughput.answering_s > 0:
        line += (
            f"; {throughput.per_second(throughput.records):.2f} documents/s, "
            f"{throughput.per_second(throughput.completion_tokens):.1f} new tokens/s, "
            f"{summary.wall_s:.0f} s in all"
        )
    out.print(line)
    if job.routing.adaptive is not None:
        share = answers_saved(job, summary.manifest)
        out.print(f"adaptive: {share:.0%} of {job.answers_per_record} answers per record saved")


def print_run(out: Console, run: Run, num_shown: int) -> None:
    """Print a published run: some records, every agent, failures by reason, where the files are."""
    for finding in report.findings(run):
        out.print(Text(printable(finding.text), style="bold red" if finding.is_bad else "bold"))
    if num_shown > 0:
        out.print(_records_table(run, num_shown))
    out.print(_agents_table(run))
    if (labels := report.label_counts(run)) is not None:
        out.print(_labels_table(labels))
    for line in since_lines(run.manifest):
        out.print(Text(printable(line)))
    for reason, count in sorted(run.manifest["counts"]["failures_by_reason"].items()):
        hint = "; --retry-failed asks again" if Reason(reason).worth_retrying else ""
        out.print(f"[yellow]{count:,} records failed: {reason}[/] (see failures/{hint})")
    results = f"results: {without_credentials(run.store.url)}/results/*.parquet"
    out.print(results, soft_wrap=True, highlight=False, markup=False)
    if run.store.exists(report.NAME):
        location = f"report: {run.store.location(report.NAME)}"
        out.print(location, soft_wrap=True, highlight=False, markup=False)


def merge_facts(merged: Run) -> dict[str, Any]:
    """What `--json` prints of a merge that was made afterwards."""
    manifest = merged.manifest
    return {
        "merge": merged.store.location(""),
        "how": manifest["merge"],
        "counts": manifest["counts"],
    }


def _records_table(run: Run, num_shown: int) -> Table:
    manifest = run.manifest
    table = Table(title=manifest["run"], show_lines=True, title_justify="left", expand=True)
    table.add_column("record", ratio=3)
    table.add_column("answer", ratio=4)
    table.add_column("confidence", justify="right", no_wrap=True)
    table.add_column("who agreed", ratio=2)
    rows = _first_results(run, num_shown)
    for row in rows:
        confidence = "–" if row["confidence"] is None else f"{row['confidence']:.2f}"
        table.add_row(
            Text(clip(row.get("text") or row["record_id"], 100)),
            Text(clip(row["answer"], 200)),
            confidence + ("\ntie" if row["tie"] else "") + _coverage(row),
            Text(_backers(row)),
        )
    if rows:
        kind = rows[0]["confidence_kind"].replace("_", " ")
        table.caption = f"merged by {manifest['merge']['method']}; confidence is {kind}"
    return table


def _first_results(run: Run, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in run.files("results"):
        if len(rows) >= count:
            break
        rows += run.store.read_table(name).slice(0, count - len(rows)).to_pylist()
    return rows


def _coverage(row: dict[str, Any]) -> str:
    """Say which share of the answer's words the text has, where it was read in parts."""
    coverage = row.get("coverage")  # runs of formats 1 and 2 have none
    return "" if coverage is None else f"\ncoverage {coverage:.2f}"


def _backers(row: dict[str, Any]) -> str:
    """Say who gave the chosen answer, and how many other answers there were."""
    best, *others = row["support"]
    text = ", ".join(best["agents"])
    return text + (
        f"\nagainst {len(others)} other{'s' if len(others) > 1 else ''}" if others else ""
    )


def _labels_table(found: report.LabelCounts) -> Table:
    table = plain_table(["said", *map(printable, found.labels)])
    for name, counts in found.rows:
        table.add_row(Text(name), *(f"{count:,}" for count in counts))
    return table


def _agents_table(run: Run) -> Table:
    table = Table("agent", "answers", "failed", "chosen", "agreed", "new tokens", "model time")
    for column in table.columns[1:]:
        column.justify = "right"
    for agent in run.manifest["agents"]:
        agreement = agent["agreement"]
        table.add_row(
            agent["agent_id"],
            f"{agent['answers']:,}",
            f"{agent['failed_answers']:,}",
            f"{agent['wins']:,}",
            "–" if agreement is None else f"{agreement:.0%}",
            f"{agent['completion_tokens']:,}",
            f"{agent['compute_s']:.1f} s",
        )
    return table
