"""Keep an evaluation beside the run that it judges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from mas_batch.evaluation.evaluate import Evaluation
from mas_batch.run_folder.names import EVALUATION
from mas_batch.run_folder.storage import Store, parquet_bytes

QUALITY = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),  # agent, random, run, merge or oracle
        pa.field("name", pa.string(), nullable=False),
        pa.field("num_records", pa.int64(), nullable=False),  # that it was asked about
        pa.field("num_missing", pa.int64(), nullable=False),  # answers that count as wrong
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("low", pa.float64()),  # 95 % interval
        pa.field("high", pa.float64()),
        pa.field("difference", pa.float64()),  # minus the best single agent
        pa.field("difference_low", pa.float64()),
        pa.field("difference_high", pa.float64()),
        pa.field("p", pa.float64()),  # of no difference, two-sided
    ]
)

AGREEMENT = pa.schema(
    [
        pa.field("agent_a", pa.string(), nullable=False),
        pa.field("agent_b", pa.string(), nullable=False),
        pa.field("num_records", pa.int64(), nullable=False),  # that both answered
        pa.field("equal", pa.float64()),
        pa.field("kappa", pa.float64()),
        pa.field("same_error", pa.float64()),
        pa.field("utility", pa.float64()),
        pa.field("mean_difference", pa.float64()),
    ]
)


def write(evaluation: Evaluation, store: Store) -> None:
    """Keep the figures in the run's folder `evaluation/`, in the place of earlier ones.

    `quality.parquet` (a row per system and metric), `agreement.parquet` (per pair of agents) and
    `calibration.json` (per merge).

    Args:
        store: the run's folder.

    Raises:
        OutputError: the filesystem refused to write.
    """
    facts = evaluation.to_json()
    quality = [_quality_row(each, score) for each in facts["qualities"] for score in each["scores"]]
    _write_table(store, "quality", quality, QUALITY)
    _write_table(store, "agreement", facts["agreement"], AGREEMENT)
    content = json.dumps(facts["confidences"], indent=1, ensure_ascii=False)
    store.replace(f"{EVALUATION}/calibration.json", content.encode())


def _write_table(store: Store, name: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    table = pa.Table.from_pylist(rows, schema)
    store.replace(f"{EVALUATION}/{name}.parquet", parquet_bytes(table))


def _quality_row(quality: Mapping[str, Any], score: Mapping[str, Any]) -> dict[str, Any]:
    difference = score["difference"] or {}
    return {
        **quality,
        **score,
        "difference": difference.get("value"),
        "difference_low": difference.get("low"),
        "difference_high": difference.get("high"),
        "p": difference.get("p"),
    }
