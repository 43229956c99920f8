"""What reading a shared prefix once is worth: the same prompts with and without it, in turn.

    python benchmarks/prefixes.py [template instructions agents samples]
        [--engine transformers] [--documents 32] [--new-tokens 16] [--rounds 3] [--threads 2]

- `template`: one agent summarizes pages by the default template, which begins all prompts;
- `instructions`: the same, the labels of a classification explained before each page;
- `agents`: three agents with unlike questions about the same long pages, the page first;
- `samples`: four samples of each page.

Agents ask at the same time, each in a thread of its own, as on a host. Medians of seconds from
asking to the last answer; the tokens of prompts that were read for others, and the answers that are
the same as without sharing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from documents import MODEL, ROOT

from mas_batch.engines import load_engine
from mas_batch.engines.base import Completion, EngineConfig, Message, Request, Sampling
from mas_batch.engines.loop import EngineLoop
from mas_batch.job import Task
from mas_batch.models import fetch
from mas_batch.tasks import make_task

WITH: dict[str, dict[str, Any]] = {
    "transformers": {},
    "vllm": {"block_size": 32, "max_context_tokens": 4096},  # a CPU's blocks are of 128 else
}
WITHOUT = {"transformers": {"share_prefixes": False}, "vllm": {"enable_prefix_caching": False}}
INSTRUCTIONS = """Which application is the help page below about? Choose one of these:
Writer: text documents, paragraphs, page styles, headers and footers, mail merge
Calc: spreadsheets, cells, formulas, functions, sheets
Impress: presentations, slides, slide shows
Base: databases, tables, queries, forms, reports
Basic: programming macros, statements, variables, functions that return values
Answer with its name only.

"""
QUESTIONS = (
    "Summarize the page above in one sentence.",
    "What does a user have to do first, according to the page above?",
    "Name three terms that the page above explains.",
)

Call = tuple[list[Request], Sampling]
"""What one agent asks."""


def texts(name: str, number: int) -> list[str]:
    lines = (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[:number]]


def request(number: int, content: str) -> Request:
    return Request(str(number), content, (Message("user", content),), seed=number)


def calls(case: str, options: argparse.Namespace) -> list[Call]:
    greedy = Sampling(options.new_tokens)
    if case == "agents":
        pages = [page[:4000] for page in texts("long_pages.jsonl", options.documents // 4)]
        return [
            ([request(i, f"{page}\n\n{question}") for i, page in enumerate(pages)], greedy)
            for question in QUESTIONS
        ]
    pages = texts("help_pages.jsonl", options.documents)
    if case == "instructions":
        return [([request(i, INSTRUCTIONS + page) for i, page in enumerate(pages)], greedy)]
    task = make_task(Task(kind="summarize"))
    asked = [
        Request(str(i), page, task.messages(page, None, prompt=None, system=None), seed=i)
        for i, page in enumerate(pages)
    ]
    if case == "samples":
        sampled = Sampling(options.new_tokens, temperature=0.7, num_samples=4)
        return [(asked[: options.documents // 2], sampled)]
    return [(asked, greedy)]


def ask(loop: EngineLoop, work: Sequence[Call]) -> tuple[float, list[Completion]]:
    with ThreadPoolExecutor(len(work)) as pool:
        start = time.perf_counter()
        answers = list(pool.map(lambda call: loop.complete(*call), work))
        seconds = time.perf_counter() - start
    return seconds, [one for rows in answers for row in rows for one in row]


def compare(case: str, options: argparse.Namespace) -> str:
    work = calls(case, options)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    found: dict[bool, list[Completion]] = {}
    for _ in range(options.rounds):
        for shared in (False, True):  # each time a new engine, which keeps nothing
            settings = WITH[options.engine] | ({} if shared else WITHOUT[options.engine])
            config = EngineConfig("float32", "cpu", options.threads, options=settings)
            loop = EngineLoop(lambda: load_engine(options.engine, fetch(MODEL), config))  # noqa: B023
            loop.complete([request(0, "Hello")], Sampling(2))
            took_s, found[shared] = ask(loop, work)
            seconds[shared].append(took_s)
            loop.close(drain=True)
            print(f"{case} {'with' if shared else 'without'} {took_s:.1f}", flush=True)
    ratios = [off / on for off, on in zip(seconds[False], seconds[True], strict=True)]
    tokens = sum(one.prompt_tokens or 0 for one in found[True])
    cached = sum(one.cached_tokens or 0 for one in found[True])
    same = sum(a.text == b.text for a, b in zip(found[False], found[True], strict=True))
    return (
        f"| {case} | {tokens:,} | {cached:,} | {statistics.median(seconds[False]):.1f} | "
        f"{statistics.median(seconds[True]):.1f} | {statistics.median(ratios):.2f} "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}) | {same} of {len(found[True])} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cases = ["template", "instructions", "agents", "samples"]
    parser.add_argument("cases", nargs="*", default=cases, metavar="|".join(cases))
    parser.add_argument("--engine", choices=list(WITHOUT), default="transformers")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows = [compare(case, options) for case in options.cases]
    print("| prompts | prompt tokens | read for others | without, s | with, s | ratio | same |")
    print("|---|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
