"""A whole run with the engine `vllm` beside a bare vLLM loop, in turn, on the same arguments.

    mas_batch   one host on an embedded cluster, partition by partition, from the model ready to the
                manifest
    bare        vLLM in a process of its own, given all documents at once: chat template, tokens,
                `add_request`, `step` until all have ended, texts. Nothing is stored

Neither times the loading of the model; each round loads both anew. Quoted are
medians over the rounds of bare ÷ mas_batch, and how many answers are the same word for word.

    .venv-vllm/bin/python benchmarks/vllm_loop.py [--documents 64] [--new-tokens 64] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from documents import DOCUMENTS, MODEL, TASK, model_folder
from timed_run import timed_run

from mas_batch.engines.base import EngineConfig
from mas_batch.engines.chat import chat_text
from mas_batch.engines.vllm.arguments import arguments
from mas_batch.engines.vllm.environment import hardware, set_up
from mas_batch.engines.vllm.options import read
from mas_batch.job import Job
from mas_batch.job_file import check_job


def make_job(folder: Path, options: argparse.Namespace) -> Job:
    engine = {
        "max_context_tokens": 2048,
        "max_num_seqs": options.max_num_seqs,
        "kv_cache_memory_bytes": 2**31,  # so that nobody is put off for want of room
    }
    return check_job(
        {
            "name": "vllm-loop",
            "corpus": {"path": str(DOCUMENTS), "id": "id", "limit": options.documents},
            "task": {"kind": "summarize", "max_new_tokens": options.new_tokens},
            "agents": [
                {"name": "a", "model": MODEL, "engine": "vllm", "threads": options.threads,
                 "options": engine}
            ],
            "merge": {"method": "vote"},
            "partition": {"max_records": options.per_partition, "max_tokens": 1_000_000},
            "output": {"path": str(folder)},
            "cluster": {"dashboard_address": None},
        }
    )  # fmt: skip


def serve_bare(job: Job, inbox: Any, outbox: Any) -> None:
    """Load vLLM as the engine does, and answer all documents when it is told to."""
    agent = job.agents[0]
    config = EngineConfig(threads=agent.threads, options=agent.options)
    here = hardware()
    set_up(here, tensor=1, threads=agent.threads, batch_invariant=False)
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    path = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = LLM(model=str(path), **arguments(path, config, read(agent.options), here)).llm_engine
    rows = [json.loads(line) for line in DOCUMENTS.read_text().splitlines()[: job.corpus.limit]]
    outbox.put(None)
    inbox.get()
    start = time.perf_counter()
    for i, row in enumerate(rows):
        turns = TASK.messages(row["text"], None, prompt=None, system=None)
        text, special = chat_text(tokenizer, turns, MODEL)
        params = SamplingParams(
            max_tokens=job.task.max_new_tokens, temperature=0.0, seed=i, logprobs=0,
            detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        engine.add_request(row["id"], {"type": "token", "prompt_token_ids": ids}, params)
    answers = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = output.outputs[0].token_ids
            answers[output.request_id] = tokenizer.decode(tokens, skip_special_tokens=True)
    seconds = time.perf_counter() - start
    outbox.put((seconds, {key: text.strip() for key, text in answers.items()}))


def run_bare(job: Job) -> tuple[float, dict[str, str]]:
    """Return the seconds and the answers of a process of its own.

    A new one for each round, as a run loads its engine anew: the first steps of one are slower.
    """
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=serve_bare, args=(job, inbox, outbox))
    process.start()
    outbox.get()
    inbox.put(True)
    found: tuple[float, dict[str, str]] = outbox.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--per-partition", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as in the workers
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            job = make_job(Path(folder) / str(number), options)
            run = timed_run(job)
            bare_s, texts = run_bare(job)
            ratios.append(bare_s / run.seconds)
            same = sum(run.answers[key] == text for key, text in texts.items())
            print(
                f"round {number}: mas_batch {run.seconds:.2f} s, bare {bare_s:.2f} s, ratio "
                f"{ratios[-1]:.3f}, same answers {same} of {len(texts)}",
                flush=True,
            )
    print(f"bare / mas_batch: median {statistics.median(ratios):.3f} of {options.rounds}")


if __name__ == "__main__":
    main()
