"""The notebooks run from top to bottom, as a newcomer runs them; none is kept with outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.waiting import PATIENCE_S

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(book, timeout=int(PATIENCE_S), resources=where).execute()
    shown = [output for cell in code for output in cell.outputs]
    assert [_warning(output) for output in shown if _is_warning(output)] == []
    assert any("text/html" in output.get("data", {}) for output in shown)


def _is_warning(output: Any) -> bool:
    return output.output_type == "stream" and output.name == "stderr"


def _warning(output: Any) -> str:
    return str(output.text)


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) == 3
