"""An evaluation as people read it in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mas_batch.evaluation.agreement import AgentPair
from mas_batch.evaluation.confidence import ConfidenceQuality
from mas_batch.evaluation.evaluate import Evaluation
from mas_batch.evaluation.scoring import Worth
from mas_batch.evaluation.speedup import Scale
from mas_batch.quality import Difference, Kind, MetricScore, Quality
from mas_batch.report.facts import AgentFacts
from mas_batch.report.label_counts import Confusion
from mas_batch.terminal import plain_table, print_section

_KINDS = {
    Kind.AGENT: "agent",
    Kind.RANDOM: "",
    Kind.RUN: "run's",
    Kind.MERGE: "merge",
    Kind.ORACLE: "limit",
}
_STYLES = {
    Worth.BETTER: "bold green",
    Worth.PERHAPS_BETTER: "bold",
    Worth.EQUAL: "bold",
    Worth.PERHAPS_WORSE: "bold yellow",
    Worth.WORSE: "bold red",
}
_OWN_ANSWERS = (Kind.AGENT, Kind.RUN, Kind.MERGE)
_BAR_WIDTH = 20
_MAX_PAIRS = 15
"""Rows of the agreement table; `--json` and agreement.parquet have all."""


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print an evaluation: the verdict first, then quality, agreement, confidence and cost."""
    _print_head(console, evaluation)
    _print_quality(console, evaluation)
    if evaluation.confusion is not None:
        _print_confusion(console, evaluation.confusion)
    if evaluation.agreement:
        _print_agreement(console, evaluation.agreement)
    if evaluation.confidences:
        _print_confidence(console, evaluation.confidences)
    _print_cost(console, evaluation.costs)
    if evaluation.scaling:
        _print_scaling(console, evaluation.scaling)


def _print_head(console: Console, evaluation: Evaluation) -> None:
    left_out = [
        f"{count:,} {why}"
        for count, why in (
            (evaluation.num_without_reference, "without a reference"),
            (evaluation.num_unusable, "without usable text"),
        )
        if count
    ]
    counted = f"{evaluation.num_records:,} records judged by column {evaluation.reference!r}"
    console.print(Text(f"{counted}; left out: {', '.join(left_out) or 'none'}"))
    console.print(Text(_verdict_line(evaluation), style=_STYLES[evaluation.verdict]))
    for note in evaluation.notes:
        console.print(Text(note, style="yellow"))


def _verdict_line(evaluation: Evaluation) -> str:
    merge, goal = evaluation.merge, evaluation.goal
    agent = f"the best single agent, {evaluation.best_agent}"
    difference = merge.score(goal).difference
    if difference is None or evaluation.verdict is Worth.EQUAL:
        return f"The merge ({merge.name}) is as good as {agent}, by {goal}"
    word, noise = evaluation.verdict.split(", ")
    loud = word.upper() if word == "worse" else word
    show = _formatter(goal)
    return (
        f"The merge ({merge.name}) is {loud} than {agent}, {noise}: {goal} "
        f"{_signed(difference.value, show)}, 95 % {_signed(difference.low, show)} to "
        f"{_signed(difference.high, show)}, p = {difference.p:.3f}"
    )


def _print_quality(console: Console, evaluation: Evaluation) -> None:
    goal, show = evaluation.goal, _formatter(evaluation.goal)
    better = "higher" if evaluation.higher_is_better else "lower"
    has_missing = any(quality.num_missing for quality in evaluation.qualities)
    header = ["", "", goal, "95 %", "Δ", "95 %", "p", *["missing"] * has_missing]
    table = plain_table(header, num_left=2)
    best = _best(evaluation, goal)
    for quality in evaluation.qualities:
        score = quality.score(goal)
        kind = "best" if _is_baseline(quality, evaluation) else _KINDS[quality.kind]
        table.add_row(
            _name(quality.kind, quality.name),
            Text(kind, style="dim"),
            _score_cell(score, best, quality),
            _range(score.low, score.high, show),
            *_difference_cells(score.difference, show),
            *[f"{quality.num_missing:,}" if quality.kind in _OWN_ANSWERS else ""] * has_missing,
        )
    about = f"{goal}, {better} is better; Δ is against the best single agent"
    print_section(console, "Quality", about, table)
    for method, why in evaluation.skipped.items():
        console.print(Text(f"{method} is not tried: {why}", style="dim"))
    _print_other_metrics(console, evaluation)


def _print_other_metrics(console: Console, evaluation: Evaluation) -> None:
    goal = evaluation.goal
    names = [score.metric for score in evaluation.qualities[0].scores if score.metric != goal]
    best = {name: _best(evaluation, name) for name in names}
    table = plain_table(["", *names])
    for quality in evaluation.qualities:
        cells = (_score_cell(quality.score(name), best[name], quality) for name in names)
        table.add_row(_name(quality.kind, quality.name), *cells)
    print_section(console, "Other metrics", "higher is better", table)
    for name, signature in evaluation.signatures.items():
        console.print(Text(f"{name}: {signature}", style="dim"))


def _name(kind: Kind, name: str) -> Text:
    return Text(name, style="bold" if kind is Kind.RUN else "")


def _is_baseline(quality: Quality, evaluation: Evaluation) -> bool:
    return quality.kind is Kind.AGENT and quality.name == evaluation.best_agent


def _best(evaluation: Evaluation, metric: str) -> float | None:
    """Return the best score of a metric, the upper bound's aside."""
    lower = metric == evaluation.goal and not evaluation.higher_is_better
    values = [
        value
        for quality in evaluation.qualities
        if quality.kind is not Kind.ORACLE and (value := quality.score(metric).value) is not None
    ]
    return (min if lower else max)(values, default=None)


def _score_cell(score: MetricScore, best: float | None, quality: Quality) -> Text:
    if score.value is None:
        return Text("–")
    is_best = score.value == best and quality.kind is not Kind.ORACLE
    return Text(_formatter(score.metric)(score.value), style="bold" if is_best else "")


def _difference_cells(difference: Difference | None, show: Callable[[float], str]) -> list[str]:
    if difference is None:
        return ["", "", ""]
    low, high = (_signed(value, show) for value in (difference.low, difference.high))
    return [_signed(difference.value, show), f"{low} {high}", f"{difference.p:.3f}"]


def _print_confusion(console: Console, found: Confusion) -> None:
    table = plain_table(["", *found.labels])
    for label, row in zip(found.labels, found.counts, strict=True):
        pairs = zip(found.labels, row, strict=True)
        cells = (Text(f"{n:,}", style="bold" if said == label else "") for said, n in pairs)
        table.add_row(Text(label), *cells)
    print_section(console, "Confusion", "a row per right label, a column per published one", table)


def _print_agreement(console: Console, pairs: Sequence[AgentPair]) -> None:
    columns = {
        "equal": ("equal", "{:.0%}"),
        "kappa": ("kappa", "{:.2f}"),
        "same_error": ("same error", "{:.0%}"),
        "utility": ("chrF", "{:.2f}"),
        "mean_difference": ("difference", "{:.3g}"),
    }
    used = [name for name in columns if any(getattr(pair, name) is not None for pair in pairs)]
    table = plain_table(["", "", "records", *(columns[name][0] for name in used)], num_left=2)
    for pair in pairs[:_MAX_PAIRS]:
        figures = (_format(getattr(pair, name), columns[name][1]) for name in used)
        table.add_row(Text(pair.agent_a), Text(pair.agent_b), f"{pair.num_records:,}", *figures)
    about = "agents that always say the same cannot correct each other"
    if len(pairs) > _MAX_PAIRS:
        about += f"; {len(pairs) - _MAX_PAIRS:,} pairs more in agreement.parquet"
    print_section(console, "Agreement", about, table)


def _print_confidence(console: Console, judged: Sequence[ConfidenceQuality]) -> None:
    about = "ECE: distance to the truth; risk: mean loss with the surest answered first"
    header = ["", "confidence", "mean", "correct", "ECE", "calibrated", "risk", "random", "best"]
    table = plain_table(header, num_left=2)
    for each in judged:
        risk = (each.risk.area, each.risk.random, each.risk.best)
        table.add_row(
            _name(each.kind, each.name),
            Text(each.confidence_kind.replace("_", " "), style="dim"),
            _format(_mean(each, "mean_confidence"), "{:.3f}"),
            _format(_mean(each, "mean_correct"), "{:.3f}"),
            _format(each.error, "{:.3f}"),
            _format(each.calibrated_error, "{:.3f}"),
            *(f"{value:.3f}" for value in risk),
        )
    print_section(console, "Confidence", about, table)
    own = next((each for each in judged if each.kind is Kind.RUN), None)
    if own is not None and own.bins:
        console.print(_diagram(own))


def _mean(judged: ConfidenceQuality, name: str) -> float | None:
    total = sum(each.num_records * getattr(each, name) for each in judged.bins)
    return total / judged.num_records if judged.bins else None


def _diagram(judged: ConfidenceQuality) -> Table:
    """Draw how often (or how far) records of like confidence are right."""
    table = plain_table(
        [judged.confidence_kind.replace("_", " "), "records", "mean", "correct", ""]
    )
    table.columns[-1].justify = "left"
    for each in judged.bins:
        full = round(each.mean_correct * _BAR_WIDTH)
        table.add_row(
            f"{each.low:.2f} – {each.high:.2f}",
            f"{each.num_records:,}",
            f"{each.mean_confidence:.3f}",
            f"{each.mean_correct:.3f}",
            Text("█" * full + "░" * (_BAR_WIDTH - full), style="cyan"),
        )
    return table


def _print_cost(console: Console, agents: Sequence[AgentFacts]) -> None:
    header = ("", "answers", "failed", "prompt tokens", "new tokens", "tokens/s", "T p50", "p95")
    table = plain_table(header)
    for agent in agents:
        counts = (agent.answers, agent.failed_answers, agent.prompt_tokens, agent.completion_tokens)
        quantiles = (agent.latency.p50_s, agent.latency.p95_s) if agent.latency else (None, None)
        table.add_row(
            Text(agent.agent_id),
            *(f"{count:,}" for count in counts),
            _format(agent.tokens_per_s, "{:,.1f}"),
            *(_format(seconds, "{:,.3f}") for seconds in quantiles),
        )
    about = "tokens/s of model time; T in seconds per answer: compute + transfer + processing"
    print_section(console, "Cost", about, table)


def _print_scaling(console: Console, scales: Sequence[Scale]) -> None:
    table = plain_table(["", "hosts", "wall s", "rec/s", "speed-up", "efficiency"])
    for scale in scales:
        hosts = ", ".join(f"{post} {count}" for post, count in scale.hosts.items())
        resumed = f" ({scale.num_executions} executions)" if scale.num_executions > 1 else ""
        table.add_row(
            Text(hosts + resumed),
            f"{scale.num_hosts:,}",
            f"{scale.wall_s:,.1f}",
            f"{scale.records_per_s:,.2f}",
            f"{scale.speed_up:.2f}",
            f"{scale.efficiency:.0%}",
        )
    about = "from the first partition asked to the last merged; against the fewest hosts"
    print_section(console, "Scaling", about, table)


def _formatter(metric: str) -> Callable[[float], str]:
    """Return how a metric's figures are written: chrF and BLEU go to 100, others to 1."""
    return "{:.1f}".format if metric in ("chrF", "BLEU") else "{:.3f}".format


def _signed(value: float, show: Callable[[float], str]) -> str:
    return ("+" if value >= 0 else "-") + show(abs(value))


def _range(low: float | None, high: float | None, show: Callable[[float], str]) -> str:
    return "" if low is None or high is None else f"{show(low)} {show(high)}"


def _format(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)
