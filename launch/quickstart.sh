#!/bin/bash
# Text to model on two CPU cores: train with the tables sharded over 2 processes, convert, generate.
# `make quickstart` sets everything up and runs this; a second run finds the training complete and goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${MF_PYTHON:-python}
run=runs/quickstart
prompt="The state of the Union"

echo "[1/4] training configs/quickstart.yaml on 2 processes (up to 4 minutes)"
OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m mf_train train configs/quickstart.yaml

echo "[2/4] converting the newest checkpoint of $run to $run/model (seconds)"
rm -rf "$run/model"
"$python" -m mf_train convert "$run" "$run/model"

echo "[3/4] generating from $run/model (seconds)"
"$python" -m mf_train generate "$run/model" "$prompt" --temperature 0.7

echo "[4/4] drawing the curves of $run (seconds)"
"$python" -m mf_train report "$run"

memoryformer=$(dirname "$(command -v "$python")")/memoryformer
cat <<END

Look at $run/report.html in a browser: loss, learning rate, speed, memory, how the tables are read. Go on with
  $memoryformer generate $run/model "Fellow citizens," --temperature 0.7
  $memoryformer evaluate $run/model --data 'configs/quickstart-text/validation/*'
  $memoryformer inspect $run                             # which rows of the tables are read
  $memoryformer train configs/quickstart.yaml training.steps=600 schedule.on_change=rewarm parallel.tensor=1
and with docs/tutorial.md, which begins with a text of your own.
END
