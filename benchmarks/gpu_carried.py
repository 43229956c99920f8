"""Copy the small models that `gpu.sh` carries to a machine without network.

    python benchmarks/gpu_carried.py FOLDER

The encoder's weights are rounded to bfloat16, which halves them: both devices then compute with
the same numbers, and that is what is compared.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from gpu_checks import ENCODER, TRANSLATOR
from safetensors.torch import load_file, save_file

from mas_batch.models import fetch


def copy_translator(target: Path) -> None:
    source = fetch(TRANSLATOR).path
    assert source is not None
    target.mkdir(parents=True)
    for pattern in ("*.intgemm.alphas.bin", "vocab*.spm"):
        for file in source.glob(pattern):
            shutil.copy(file, target)


def copy_encoder(target: Path) -> None:
    source = fetch(ENCODER).path
    assert source is not None
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.md", "data_config.json"))
    for file in target.glob("*.safetensors"):
        weights = load_file(file)
        rounded = {
            name: value.to(torch.bfloat16) if value.is_floating_point() else value
            for name, value in weights.items()
        }
        save_file(rounded, file, metadata={"format": "pt"})


if __name__ == "__main__":
    copy_translator(Path(sys.argv[1]) / "translator")
    copy_encoder(Path(sys.argv[1]) / "encoder")
