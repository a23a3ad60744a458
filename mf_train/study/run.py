"""Runs a study's cells: here, some at a time, or as a SLURM array. What is done is skipped; what failed is listed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from mf_train.config.loading import config_to_tree
from mf_train.config.yaml_text import yaml_text
from mf_train.errors import UserError
from mf_train.exit_status import STOPPED
from mf_train.files import write_whole
from mf_train.launch.options import TASK, JobOptions
from mf_train.processors import usable_processors
from mf_train.stop_signals import listen
from mf_train.study.cells import CELLS, Cell, Grid, cell_folder, describe_values
from mf_train.study.state import DONE, FAILED, LOG, Outcome, State, cell_state, read_outcome, write_outcome
from mf_train.study.study import Study

_LOCK = "run.lock"
_POLL_SECONDS = 0.2
_REDO = "delete its folder to run it again"


@dataclass
class _Process:
    cell: Cell
    process: subprocess.Popen[bytes]
    began: float
    log_begin: int  # where this start's output begins in the cell's log


def cells_to_run(grid: Grid, retry: bool) -> list[tuple[Cell, State]]:
    """Cells that are not done; those that failed only with `retry`."""
    states = [(cell, cell_state(cell)) for cell in grid.cells]
    return [(cell, state) for cell, state in states if state.name != DONE and (retry or state.name != FAILED)]


def write_cells(study: Study, cells: Sequence[Cell]) -> None:
    """Write the cells' configurations into the study's folder: their numbers are fixed from then on."""
    folder = study.folder / CELLS
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        path = folder / f"{cell.number}.yaml"
        if not path.exists():
            tree = config_to_tree(cell.config)
            write_whole(path, yaml_text(tree).encode())


def run_here(study: Study, grid: Grid, at_once: int = 1, retry: bool = False) -> int:
    """Run cells on this machine, `at_once` at a time; returns the exit status.

    0: all are done; 1: some failed, which does not stop the others; 75: stopped on request, this command or some cells,
    which have saved.
    Raises UserError where another `study run` works on the study.
    """
    _check_cells(study, grid)
    with _only_one(study) as lock:
        todo = cells_to_run(grid, retry)
        write_cells(study, [cell for cell, _ in todo])
        print(f"{len(grid.cells)} cells, {len(todo)} to run, {at_once} at a time", flush=True)
        stopped = _run_all(study, [cell for cell, _ in todo], at_once, lock)
        states = [(cell, cell_state(cell)) for cell in grid.cells]
        failed = [(cell, state) for cell, state in states if state.name == FAILED]
        for cell, state in failed:
            print(f"cell {cell.number} failed at step {state.step}: {state.reason}", flush=True)
        if stopped:
            print("stopped on request; run the same command again to go on", flush=True)
            return STOPPED
        if failed:
            print(f"{len(failed)} of {len(grid.cells)} cells failed; --retry-failed runs them again")
        halted = odd = 0
        for cell, state in states:
            if state.name in (DONE, FAILED):
                continue
            outcome = read_outcome(cell.folder)
            if outcome and outcome.status == STOPPED:
                halted += 1
                print(
                    f"cell {cell.number} was stopped at step {state.step}; run the same command again to go on"
                )
            else:
                odd += 1
                print(f"cell {cell.number} has ended, but its metrics.jsonl lacks the last step; {_REDO}")
        return 1 if failed or odd else STOPPED if halted else 0


def submit_array(
    study: Study,
    grid: Grid,
    options: JobOptions,
    at_once: int | None = None,
    retry: bool = False,
    *,
    dry_run: bool = False,
    parsable: bool = False,
    command: Sequence[str] = (),
) -> int:
    """Submit the cells that are not done as the tasks of one SLURM array; returns the exit status.

    Each cell trains in a folder of its own, as `memoryformer launch --array` has it. Raises UserError.
    """
    from mf_train.launch.submit import launch

    if options.array is not None or options.elastic is not None:
        raise UserError(
            "--array and --elastic do not go with a study: its cells are the array, of one size each"
        )
    processes = options.nodes * options.per_node
    if processes != study.processes:
        raise UserError(
            f"{study.path}: processes is {study.processes}, and --nodes {options.nodes} with {options.per_node} "
            f"processes each gives {processes}: make them agree"
        )
    _check_cells(study, grid)
    todo = [cell for cell, _ in cells_to_run(grid, retry)]
    if not todo:
        failed = sum(cell_state(cell).name == FAILED for cell in grid.cells)
        remedy = f": {failed} failed, --retry-failed submits them again" if failed else ""
        print(f"nothing to run{remedy}", file=sys.stderr)
        return 0
    write_cells(study, todo)
    array = array_text(sorted(cell.number for cell in todo)) + (f"%{at_once}" if at_once else "")
    return launch(
        str(study.folder / CELLS / f"{TASK}.yaml"),
        [f"training.output_dir={cell_folder(study, TASK)}"],
        replace(options, array=array, job_name=options.job_name or study.folder.name),
        dry_run=dry_run,
        parsable=parsable,
        command=command,
    )


def array_text(numbers: Sequence[int]) -> str:
    """Ascending numbers as sbatch reads them: 0-3,5,7-8."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


def _check_cells(study: Study, grid: Grid) -> None:
    if not grid.cells:
        first = grid.left_out[0]
        raise UserError(
            f"{study.path}: no cell is left to run; {len(grid.left_out)} places of the grid are left out, the first: "
            f"{first.reason}"
        )


def _run_all(study: Study, cells: Sequence[Cell], at_once: int, lock: int) -> bool:
    """Whether a stop was asked for; then the running cells have been told, and have ended."""
    waiting, running = list(cells), list[_Process]()
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for one in running:
            one.process.send_signal(signal.SIGTERM)

    before = listen(stop)
    try:
        while (waiting and not asked) or running:
            while waiting and len(running) < at_once and not asked:
                running.append(_start(study, waiting.pop(0), at_once, lock))
            if asked:  # also one that has been started while the signal came
                for one in running:
                    one.process.send_signal(signal.SIGTERM)
            ended = [one for one in running if one.process.poll() is not None]
            for one in ended:
                running.remove(one)
                _note_end(one, bool(asked))
            time.sleep(0 if ended else _POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for one in running:  # only where this process itself failed
            one.process.terminate()
    return bool(asked)


def _start(study: Study, cell: Cell, at_once: int, lock: int) -> _Process:
    cell.folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, usable_processors() // (at_once * study.processes)))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    config = str(study.folder / CELLS / f"{cell.number}.yaml")
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={study.processes}"]
    command = [sys.executable, *(several if study.processes > 1 else []), "-m", "mf_train", "train", config]
    with (cell.folder / LOG).open("ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the cells through `stop` alone
            pass_fds=[lock],  # a cell that outlives this process keeps the study locked
        )
    print(f"cell {cell.number} starts: {describe_values(cell.values)}", flush=True)
    return _Process(cell, process, time.monotonic(), begin)


def _note_end(one: _Process, asked: bool) -> None:
    code = one.process.returncode
    status = code if code >= 0 else 128 - code
    if asked and code == -signal.SIGTERM:  # it was asked to stop before it listened
        status = STOPPED
    seconds = time.monotonic() - one.began
    reason = _last_line(one.cell.folder / LOG, one.log_begin) if status else "done"
    if code < 0:
        reason = f"killed by signal {-code} ({signal.Signals(-code).name})"
    write_outcome(
        one.cell.folder, Outcome(status, reason or f"ended with status {status}", round(seconds, 2))
    )
    state = cell_state(one.cell)
    print(f"cell {one.cell.number} {state.name} at step {state.step} after {seconds:.0f} s", flush=True)


def _last_line(path: Path, begin: int) -> str:
    with path.open("rb") as file:
        file.seek(begin)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("memoryformer: ")]
    return (ours or lines or [""])[-1].removeprefix("memoryformer: ")


@contextmanager
def _only_one(study: Study) -> Iterator[int]:
    """Yields the lock's descriptor; locked as long as any process has it."""
    study.folder.mkdir(parents=True, exist_ok=True)
    with (study.folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{study.folder}: another `study run` works on it, or cells that a killed one left: wait for them, or "
                "give this study another output_dir"
            ) from None
        yield file.fileno()
