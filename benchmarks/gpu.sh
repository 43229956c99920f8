#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than nine minutes and without network.
#
#   benchmarks/gpu.sh --pack DIR [PYTHON-VERSION]      here, with network: collect what to carry
#   benchmarks/gpu.sh [--carried DIR] [ARGUMENTS]      there: run; arguments are those of gpu.py
#
# Of the machine with the GPU nothing is expected but a python3 with PyTorch, transformers and
# what comes along with them (numpy, pandas, pyarrow, ...); whatever else is missing is named.
# What is carried stays under 60 MB: wheels of the few packages that such a machine lacks, the
# translation model, and the encoder in bfloat16. Large models get random weights on the spot.
set -euo pipefail
python3=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"

wheels=(
  annotated-types bokeh dask dask-cuda distributed importlib-metadata lazy-importer locket partd
  pydantic pydantic-core rapids-dask-dependency tblib tornado typing-extensions
  typing-inspection xyzservices zict zipp
)

pack() {
  local folder=$1 python=${2:-3.12} glibc
  local platforms=()
  for glibc in 2_28 2_27 2_24 2_17 2_12; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
  mkdir -p "$folder/wheels"
  # Versions of dev.lock; what it does not name, the newest.
  "$python3" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "$python" "${platforms[@]}" --platform manylinux2014_x86_64 \
    -c "$here/../requirements/dev.lock" -d "$folder/wheels" "${wheels[@]}"
  "$python3" "$here/gpu_carried.py" "$folder/models"
  tar -C "$folder" -cJf "$folder/models.tar.xz" models
  rm -r "$folder/models"
  du -ch "$folder/models.tar.xz" "$folder"/wheels/*.whl
}

if [[ ${1:-} == --pack ]]; then
  pack "${2:?--pack needs a folder}" "${3:-3.12}"
  exit
fi

arguments=()
if [[ ${1:-} == --carried ]]; then
  carried=${2:?--carried needs a folder}
  shift 2
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "$python3" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --target "$scratch/site" "$carried"/wheels/*.whl
  tar -C "$scratch" -xJf "$carried/models.tar.xz"
  export PYTHONPATH="$PYTHONPATH:$scratch/site"
  arguments+=(--models "$scratch/models")
fi
# Without network nothing may wait for one.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PIP_NO_INDEX=1
# Its own limit is lower, so that the table comes in any case.
timeout 535 "$python3" "$here/gpu.py" "${arguments[@]}" "$@"
