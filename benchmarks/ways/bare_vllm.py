"""vLLM in process, all prompts at once: a way of `peers.py`.

It runs in an environment of its own, without mas_batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_bytes())
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS=str(settings["threads"]),
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    begun = time.perf_counter()
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_model_len=2048,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
        max_num_seqs=64,
        seed=0,
    )
    sampling = SamplingParams(max_tokens=settings["new_tokens"], temperature=0.0)
    prompts = [{"prompt_token_ids": prompt["tokens"]} for prompt in settings["prompts"]]
    llm.generate(prompts[:2], sampling, use_tqdm=False)  # the first call is slower than the others
    start = time.perf_counter()
    found = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    texts = [one.outputs[0].text for one in found]
    answer = {"load_s": start - begun, "seconds": seconds, "texts": texts}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
