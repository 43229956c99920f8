"""What a job may name: one line each. A value is imported when it is asked for, not before."""

from __future__ import annotations

from typing import Any

from mas_batch.engine_info import EngineInfo
from mas_batch.registry import Registry

ENGINES: Registry[EngineInfo] = Registry(
    "agents.engine",
    "mas_batch.engines",
    {
        "echo": EngineInfo(
            "mas_batch.engines.echo",
            options="mas_batch.engines.echo:read",
            holds="nothing",
            concurrent=1,  # some of its faults count batches: they must not depend on who is fast
            computes_elsewhere=True,
            uses_threads=False,
            operational=("concurrent",),
            limits=("max_context_tokens",),
            random_options=("error_rate",),
            greedy_samples_differ=True,
        ),
        "transformers": EngineInfo(
            "mas_batch.engines.transformers.engine",
            "mas_batch[cpu]",
            options="mas_batch.engines.transformers.options:read",
            quantizes=("int8",),
            scores_choices=True,
            # One ends, one is half-way, one begins, and one is being read or written meanwhile.
            concurrent=4,
            adapters=True,
        ),
        "marian": EngineInfo(
            "mas_batch.engines.marian.engine",
            "mas_batch[cpu]",
            options="mas_batch.engines.marian.options:read",
            detected_by=("*.intgemm.alphas.bin",),
        ),
        "ctranslate2": EngineInfo(
            "mas_batch.engines.ctranslate2",
            "mas_batch[ctranslate2]",
            options="mas_batch.engines.ctranslate2_options:read",
            detected_by=("model.bin",),
        ),
        "vllm": EngineInfo(
            "mas_batch.engines.vllm.loading",
            "mas_batch[vllm]",
            options="mas_batch.engines.vllm.options:read",
            adapters=True,
            scores_choices=True,
            tensor_parallel=True,
            operational=(
                "gpu_memory_utilization",
                "kv_cache_memory_bytes",
                "max_num_seqs",
                "max_num_batched_tokens",
                "enable_prefix_caching",
                "enforce_eager",
                "max_lora_rank",
            ),
            limits=("max_context_tokens",),
        ),
        "openai": EngineInfo(
            "mas_batch.engines.openai",
            "mas_batch[openai]",
            options="mas_batch.engines.openai:read",
            holds="endpoint",
            concurrent=4,
            computes_elsewhere=True,
            uses_threads=False,
            operational=("concurrency", "timeout_s", "max_retries", "wait_s", "api_key_env"),
            limits=("max_context_tokens",),
        ),
        "nearest": EngineInfo(
            "mas_batch.engines.classical.nearest",
            "mas_batch[cpu]",
            options="mas_batch.engines.classical.nearest_options:read",
            detected_by=("modules.json",),  # the sentence-transformers layout
            agent_options=("*",),
        ),
        "bayes": EngineInfo(
            "mas_batch.engines.classical.bayes",
            options="mas_batch.engines.classical.bayes:read",
            holds="nothing",
            uses_threads=False,
        ),
        "keywords": EngineInfo(
            "mas_batch.engines.classical.keywords",
            options="mas_batch.engines.classical.keywords:read",
            holds="nothing",
            uses_threads=False,
        ),
        "overlap": EngineInfo(
            "mas_batch.engines.classical.overlap",
            options="mas_batch.engines.classical.overlap:read",
            holds="nothing",
            uses_threads=False,
        ),
    },
)
"""Engine name → `EngineInfo`. Of several that detect a model's files, the first one has it."""

TASKS: Registry[Any] = Registry(
    "task.kind",
    "mas_batch.tasks",
    {
        "summarize": "mas_batch.tasks.summarize:Summarize",
        "translate": "mas_batch.tasks.translate:Translate",
        "classify": "mas_batch.tasks.classify:Classify",
        "score": "mas_batch.tasks.score:Score",
        "reply": "mas_batch.tasks.reply:Reply",
    },
)
"""Classes of `tasks.base.Task`."""

ANSWER_KINDS: Registry[Any] = Registry(
    "task's answer_kind",
    "mas_batch.answer_kinds",
    {
        "text": "mas_batch.aggregate.answer_kinds:TEXT",
        "label": "mas_batch.aggregate.answer_kinds:LABEL",
        "value": "mas_batch.aggregate.answer_kinds:VALUE",
    },
)
"""`aggregate.answer_kinds.AnswerKind`."""

METHODS: Registry[Any] = Registry(
    "merge.method",
    "mas_batch.merges",
    {
        "vote": "mas_batch.aggregate.vote:VOTE",
        "mean": "mas_batch.aggregate.vote:MEAN",
        "weighted": "mas_batch.aggregate.vote:WEIGHTED",
        "reliability": "mas_batch.aggregate.posterior_vote:RELIABILITY",
        "mbr": "mas_batch.aggregate.mbr:MBR",
        "rover": "mas_batch.aggregate.rover:ROVER",
        "best": "mas_batch.aggregate.best:BEST",
        "auto": "mas_batch.aggregate.auto:AUTO",
    },
)
"""`aggregate.method.Method`."""

POLICIES: Registry[Any] = Registry(
    "routing.policy",
    "mas_batch.policies",
    {
        "capability": "mas_batch.routing.policies:Capability",
        "round-robin": "mas_batch.routing.policies:RoundRobin",
        "random": "mas_batch.routing.policies:Random",
        "least-loaded": "mas_batch.routing.policies:LeastLoaded",
        "random-low-load": "mas_batch.routing.policies:RandomLowLoad",
        "weighted-round-robin": "mas_batch.routing.policies:WeightedRoundRobin",
        "throughput": "mas_batch.routing.policies:Throughput",
        "reliability": "mas_batch.routing.policies:MostReliable",
    },
)
"""Classes of `routing.policies.Policy`."""
