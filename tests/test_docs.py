"""What the documents say is kept true by the code."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml
from pydantic import BaseModel

from mas_batch import job
from mas_batch.job_file import check_job

ROOT = Path(__file__).parent.parent
SECTIONS = (
    *(job.Corpus, job.Task, job.Agent, job.AgentSampling, job.Parallel, job.Routing, job.Merge),
    *(job.Partitioning, job.Output, job.Cluster, job.Job),
)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_documented(section: type[BaseModel]) -> None:
    words = set(re.findall(r"[a-z_]+", (ROOT / "docs/job-file.md").read_text()))
    assert set(section.model_fields) <= words


def test_the_job_in_the_readme_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert check_job(yaml.safe_load(block)).answers_per_record == 3


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def glossary() -> list[tuple[str, str]]:
    text = (ROOT / "docs/glossary.md").read_text()
    return re.findall(r"^\| ([a-z ]+) \| `([A-Za-z_.]+)` \|", text, re.MULTILINE)


@pytest.mark.parametrize(("word", "name"), glossary())
def test_each_word_of_the_glossary_is_a_name_in_the_code(word: str, name: str) -> None:
    *owners, last = name.split(".")
    assert word.replace(" ", "_") in name.lower(), "the name holds the word"
    try:
        import_module(f"mas_batch.{name}")
    except ModuleNotFoundError:
        owner = resolve_name(".".join(["mas_batch", *owners]))
        fields = getattr(owner, "model_fields", None) or getattr(owner, "__annotations__", {})
        assert hasattr(owner, last) or last in fields


def test_a_word_stands_in_the_glossary_once() -> None:
    words = [word for word, _ in glossary()]
    assert len(words) > 40
    assert len(words) == len(set(words))


def test_the_journey_names_what_exists() -> None:
    """Every `module.name` in the journey is there."""
    text = (ROOT / "docs/journey-of-a-document.md").read_text()
    for dotted in set(re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_]+)`", text)):
        module_name, _, attribute = dotted.rpartition(".")
        if module_name.endswith((".yaml", ".parquet")) or attribute in ("json", "yaml", "parquet"):
            continue
        owner, _, class_name = module_name.rpartition(".")
        if class_name[:1].isupper():
            module = getattr(import_module(f"mas_batch.{owner}"), class_name)
        else:
            try:
                module = import_module(f"mas_batch.{module_name}")
            except ModuleNotFoundError:
                module = getattr(import_module("mas_batch"), module_name)
        assert hasattr(module, attribute) or import_module(f"mas_batch.{dotted}"), dotted
