"""What a job may name: one line each. A value is imported when it is asked for, not before."""

from __future__ import annotations

from mas_batch.engine_info import EngineInfo
from mas_batch.registry import Registry

ENGINES: Registry[EngineInfo] = Registry(
    "agents.engine",
    "mas_batch.engines",
    {
        "echo": EngineInfo(
            "mas_batch.engines.echo",
            holds="nothing",
            computes_elsewhere=True,
            random_options=("error_rate",),
            greedy_samples_differ=True,
        ),
        "transformers": EngineInfo("mas_batch.engines.transformers.engine", "mas_batch[cpu]"),
        "marian": EngineInfo(
            "mas_batch.engines.marian.engine",
            "mas_batch[cpu]",
            detected_by=("*.intgemm.alphas.bin",),
        ),
        "ctranslate2": EngineInfo(
            "mas_batch.engines.ctranslate2", "mas_batch[ctranslate2]", detected_by=("model.bin",)
        ),
        "openai": EngineInfo(
            "mas_batch.engines.openai",
            "mas_batch[openai]",
            holds="endpoint",
            computes_elsewhere=True,
            operational=("concurrency", "timeout_s", "max_retries", "api_key_env"),
        ),
        "nearest": EngineInfo(
            "mas_batch.engines.classical.nearest",
            "mas_batch[cpu]",
            detected_by=("modules.json",),  # the sentence-transformers layout
        ),
        "bayes": EngineInfo("mas_batch.engines.classical.bayes", holds="nothing"),
        "keywords": EngineInfo("mas_batch.engines.classical.keywords", holds="nothing"),
        "overlap": EngineInfo("mas_batch.engines.classical.overlap", holds="nothing"),
    },
)
"""Engine name → `EngineInfo`. Of several that detect a model's files, the first one has it."""
