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

echo "[2/3] converting the newest checkpoint of $run to $run/model (seconds)"
rm -rf "$run/model"
"$python" -m mf_train convert "$run" "$run/model"

echo "[3/3] generating from $run/model (seconds)"
"$python" -m mf_train generate "$run/model" "$prompt" --temperature 0.7

memoryformer=$(dirname "$(command -v "$python")")/memoryformer
cat <<END

Go on with
  $memoryformer generate $run/model "Fellow citizens," --temperature 0.7
  $memoryformer evaluate $run/model --data 'configs/quickstart-text/validation/*'
  $memoryformer train --help
END
