"""Text to model on two CPU cores: train with the tables sharded over two processes, convert, generate, report.

A second run finds the training complete and continues from there.
"""

from __future__ import annotations

import filecmp
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from mf_train.config.loading import load_config
from mf_train.errors import UserError
from mf_train.exit_status import STOPPED
from mf_train.files import write_whole
from mf_train.stop_signals import BY_LAUNCHER, listen

SHIPPED = Path(__file__).with_name("shipped")
CONFIG = Path("configs/quickstart.yaml")
# below SHIPPED, and below the working directory; the configuration comes last, so that where it is, all is
_FILES = (
    "configs/quickstart-text/README.md",
    "configs/quickstart-text/*/*.jsonl.gz",
    "tokenizer/*",
    str(CONFIG),
)
_PROCESSES = 2
_PROMPT = "The state of the Union"
_PACKAGES = ("deepspeed", "megatron", "sentencepiece", "transformers", "jinja2", "matplotlib")


def quickstart(overrides: Sequence[str]) -> int:
    """Run all parts in the working directory; returns the exit status, that of the first part that fails.

    `overrides` replace settings of CONFIG for the training. Raises UserError, and ModuleNotFoundError where a package
    that a later part needs is not installed.
    """
    for name in _PACKAGES:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if written := place_files(Path()):
        print(f"[0/4] wrote {CONFIG}, its text and tokenizer/: {written} files", flush=True)
    config = load_config(CONFIG, overrides)
    run = config.training.output_dir
    model = f"{run}/model"
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(_PROCESSES)]
    train = [*several, "-m", "mf_train", "train", str(CONFIG), *overrides]
    words = f"[1/4] training {CONFIG} on {_PROCESSES} processes (up to 4 minutes)"
    if status := _run(words, train, OMP_NUM_THREADS="1"):
        return status
    shutil.rmtree(model, ignore_errors=True)  # of an earlier quickstart
    for words, command in (
        (f"[2/4] converting the newest checkpoint of {run} to {model} (seconds)", ["convert", run, model]),
        (f"[3/4] generating from {model} (seconds)", ["generate", model, _PROMPT, "--temperature", "0.7"]),
        (f"[4/4] drawing the curves of {run} (seconds)", ["report", run]),
    ):
        if status := _run(words, ["-m", "mf_train", *command]):
            return status
    print(_what_next(run, model), flush=True)
    return 0


def place_files(folder: Path) -> int:
    """Copy what `configs/quickstart.yaml` needs into `folder`, unless it has that file; returns the number of files.

    Raises UserError where a file of another content is in the way; then nothing is written.
    """
    if (folder / CONFIG).exists():
        return 0
    names = [path.relative_to(SHIPPED) for pattern in _FILES for path in sorted(SHIPPED.glob(pattern))]
    for name in names:
        here = folder / name
        if here.exists() and not (here.is_file() and filecmp.cmp(here, SHIPPED / name, shallow=False)):
            raise UserError(f"{here} is there already, and not the quickstart's: run it in an empty folder")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, (SHIPPED / name).read_bytes())
    return len(names)


def _run(words: str, arguments: Sequence[str], **environment: str) -> int:
    """Say what comes and run python with these arguments; returns its status, or STOPPED after a signal to stop.

    A terminal's signals reach the child too; what a launcher sends to this process alone is handed on. Either way the
    child may take its time: it saves.
    """
    print(words, flush=True)
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if number in BY_LAUNCHER:
            child.send_signal(signal.SIGTERM)

    child = subprocess.Popen([sys.executable, *arguments], env=os.environ | environment)
    before = listen(stop)
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return STOPPED if asked else status if status >= 0 else 128 - status


def _what_next(run: str, model: str) -> str:
    command = shlex.quote(_command())
    return f"""
Look at {run}/report.html in a browser: loss, learning rate, speed, memory, how the tables are read. Go on with
  {command} generate {model} "Fellow citizens," --temperature 0.7
  {command} evaluate {model} --data 'configs/quickstart-text/validation/*'
  {command} inspect {run}                             # which rows of the tables are read
  {command} train {CONFIG} training.steps=600 schedule.on_change=rewarm parallel.tensor=1
and with docs/tutorial.md of the repository, which begins with a text of your own."""


def _command() -> str:
    """How this environment's command is called from here."""
    mine = Path(sys.executable).with_name("memoryformer")
    found = shutil.which("memoryformer")
    if found and Path(found) == mine:
        return "memoryformer"
    return os.path.relpath(mine) if mine.is_relative_to(Path.cwd()) else str(mine)
