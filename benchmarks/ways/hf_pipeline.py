"""Hugging Face's `pipeline`, batches of 8 in file order: a way of `peers.py`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


class Pipeline:
    """A model, and how it is asked. `ray_actors.py` has one in each actor."""

    def __init__(self, settings: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        folder, dtype = settings["model"], getattr(torch, settings["dtype"])
        self._new_tokens = settings["new_tokens"]
        self._generate = pipeline(
            "text-generation",
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            tokenizer=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            batch_size=8,
        )

    def __call__(self, prompts: list[str]) -> list[str]:
        found = self._generate(
            prompts,
            do_sample=False,
            max_new_tokens=self._new_tokens,
            return_full_text=False,
            add_special_tokens=False,
        )
        return [rows[0]["generated_text"] for rows in found]


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_bytes())
    begun = time.perf_counter()
    ask = Pipeline(settings, settings["threads"])
    start = time.perf_counter()
    texts = ask([prompt["text"] for prompt in settings["prompts"]])
    seconds = time.perf_counter() - start
    answer = {"load_s": start - begun, "seconds": seconds, "texts": texts}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
