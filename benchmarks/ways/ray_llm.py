"""Ray Data LLM: `build_processor` of a vLLM engine. A way of `peers.py`.

It runs in the environment of vLLM, without mas_batch. It does not tell when its engine is ready:
timed is what its engine stage says that the one batch of all prompts took, so what Ray Data does
around it counts as loading.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_bytes())
    prompts = [prompt["text"] for prompt in settings["prompts"]]
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(settings["threads"]),
        "VLLM_NO_USAGE_STATS": "1",
    }
    os.environ.update(variables)
    ray.init(include_dashboard=False, object_store_memory=200 * 2**20, num_cpus=8)
    ray.data.DataContext.get_current().enable_progress_bars = False
    config = vLLMEngineProcessorConfig(
        model_source=settings["model"],
        engine_kwargs={
            "dtype": settings["dtype"],
            "max_model_len": 2048,
            "kv_cache_memory_bytes": 1 << 30,
            "enforce_eager": True,
            "max_num_seqs": 64,
        },
        placement_group_config={"bundles": [{"CPU": 1}]},
        log_engine_metrics=False,
        runtime_env={"env_vars": variables},
        concurrency=1,
        batch_size=len(prompts),
        chat_template_stage={"enabled": False},
        tokenize_stage={"enabled": False},
        detokenize_stage={"enabled": False},
    )
    sampling = {"max_tokens": settings["new_tokens"], "temperature": 0.0}
    processor = build_processor(
        config,
        preprocess=lambda row: {
            "number": row["number"],
            "prompt": row["prompt"],
            "sampling_params": sampling,
        },
        postprocess=lambda row: {
            "number": row["number"],
            "text": row["generated_text"],
            "seconds": row["time_taken_llm"],
        },
    )
    begun = time.time()
    rows = [{"number": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    found = processor(ray.data.from_items(rows, override_num_blocks=1)).take_all()
    total_s = time.time() - begun
    seconds = max(row["seconds"] for row in found)
    texts = [row["text"] for row in sorted(found, key=lambda row: row["number"])]
    answer = {"load_s": total_s - seconds, "seconds": seconds, "texts": texts}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
