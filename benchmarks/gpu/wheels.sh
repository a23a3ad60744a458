#!/bin/bash
# benchmarks/gpu/wheels.sh FOLDER [PYTHON_VERSION]: what the trainer needs beside torch, triton, pytest and transformers, as
# wheels for a Linux x86-64 machine without a network (by default of Python 3.12), at the versions of constraints.txt:
# 85 MB, of which pyarrow, 55 MB, is for training on text alone. docs/kernels.md says what to do with them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:?usage: benchmarks/gpu/wheels.sh FOLDER [PYTHON_VERSION]}
version=${2:-3.12}
python=${PYTHON:-python3}
packages=(
    pyyaml safetensors sentencepiece megatron-core                                       # of the project itself
    pydantic pydantic-core annotated-types typing-inspection                             # of deepspeed
    hjson msgpack einops ninja psutil py-cpuinfo packaging
    datasets pyarrow pandas dill multiprocess xxhash fsspec filelock zstandard           # of text, and of the tests
    python-dateutil six pytz tzdata
)
platforms=()
for platform in manylinux_2_{28,27,24,17}_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
    platforms+=(--platform "$platform")
done

pinned() { grep -iE "^${1//-/[-_]}==" constraints.txt || echo "$1"; }

mkdir -p "$folder"
for package in "${packages[@]}"; do
    "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
        --python-version "$version" "${platforms[@]}" -d "$folder" "$(pinned "$package")"
done
# a source package, of which nothing is compiled: any Python's wheel serves
DS_BUILD_OPS=0 "$python" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w "$folder" "$(pinned deepspeed)"
du -ch "$folder"/*.whl | tail -n 1
