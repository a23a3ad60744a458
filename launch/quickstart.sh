#!/bin/bash
# Text to model on two CPU cores: train with the tables sharded over 2 processes, convert, generate.
# `make quickstart` sets everything up and runs this; a second run finds the training complete and goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${MF_PYTHON:-python}
run=runs/quickstart
prompt="The state of the Union"

echo "[1/3] training configs/quickstart.yaml on 2 processes (up to 4 minutes)"
OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m mf_train train configs/quickstart.yaml

checkpoint=$run/checkpoints/$(<$run/checkpoints/latest)
echo "[2/3] converting $checkpoint to $run/model (seconds)"
rm -rf "$run/model"
"$python" -m mf_train convert "$checkpoint" "$run/model"

echo "[3/3] generating from $run/model (seconds)"
"$python" -m mf_train generate "$run/model" "$prompt"

memoryformer=$(dirname "$(command -v "$python")")/memoryformer
cat <<END

Go on with
  $memoryformer generate $run/model "Fellow citizens,"
  $memoryformer train --help
END
