"""Ray Data: `map_batches` of an actor per core, each with a pipeline. A way of `peers.py`.

It runs in an environment of its own, without mas_batch. Timed is from the moment when the last
actor holds its model to the last answer; the first may have begun before, as in a run of ours.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
from hf_pipeline import Pipeline


class Actor:
    """The class of `map_batches`: Ray makes one per actor."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._ask = Pipeline(settings, threads=1)
        self._ready = time.time()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        texts = self._ask(list(batch["prompt"]))
        return {"number": batch["number"], "text": texts, "ready": [self._ready] * len(texts)}


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_bytes())
    prompts = [prompt["text"] for prompt in settings.pop("prompts")]
    num_actors = settings["threads"]
    ray.init(num_cpus=num_actors, include_dashboard=False, object_store_memory=200 * 2**20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    begun = time.time()
    rows = [{"number": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    found = (
        ray.data.from_items(rows, override_num_blocks=-(-len(rows) // 8))
        .map_batches(
            Actor,
            fn_constructor_kwargs={"settings": settings},
            batch_size=8,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=num_actors),
        )
        .take_all()
    )
    end = time.time()
    ready = max(row["ready"] for row in found)
    texts = [row["text"] for row in sorted(found, key=lambda row: row["number"])]
    answer = {"load_s": ready - begun, "seconds": end - ready, "texts": texts}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
