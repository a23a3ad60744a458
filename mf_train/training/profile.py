"""Profiles of a run's steps: a trace, a snapshot of memory, and a summary by part, in the run's folder.

The model knows nothing of it: while steps are profiled, hooks and wrapped methods put named ranges around
the parts, and are gone afterwards. docs/profiling.md says what is written and how to read it.
"""

import gzip
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mf_train.checkpoint.layout import step_name
from mf_train.config import Config
from mf_train.files import beside, write_whole
from mf_train.parallel.engine import Engine
from mf_train.parallel.kinds import AVERAGE, MOMENTS
from mf_train.run_folder import PROFILE
from mf_train.training.metrics import process_peak
from mf_train.training.profile_ranges import MODEL_PARTS, named_method, named_parts
from mf_train.training.profile_summary import STEP, Trace, table

_MEMORY_EVENTS = 100_000  # of the GPU's allocator, the newest; each takes about a kilobyte

Part = tuple[Any, str, str]  # an object, its method, and what the time in it is called


def profile_path(folder: Path, step: int, rank: int, kind: str) -> Path:
    """A file of the profile that begins with `step`: `kind` is trace.json.gz, memory.pickle, summary.json, ..."""
    return folder / PROFILE / f"{step_name(step)}-rank-{rank:05d}.{kind}"


class Profile:
    """Records the steps that `training.profile` names, on the ranks that it names, and then writes what was recorded.

    The run continues after `step`. `turn` is called between steps. `parts` are methods, whose time gets a name.
    `still_alive` is called between files. Rank 0 says where no step is left to profile.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        step: int,
        parts: Sequence[Part],
        say: Callable[[str], None],
        still_alive: Callable[[], None],
    ) -> None:
        wanted, self.rank = config.training.profile, engine.groups.degrees.rank
        first, last = wanted.start, wanted.start + wanted.steps - 1
        if step >= last and self.rank == 0:
            say(
                f"warning: training.profile asks for steps {first} to {last} and this run goes on after step {step}: "
                "nothing is profiled"
            )
        self.steps = range(first, last + 1) if self.rank in wanted.ranks else range(0)
        self.folder = Path(config.training.output_dir)
        self.engine = engine
        self.parts = [*parts, (engine, "gradient_norm", "gradient norm"), (engine, "update", "optimizer")]
        self.say, self.still_alive = say, still_alive
        self._ranges: ExitStack | None = None  # while steps are recorded
        self._step = ExitStack()  # the current step's range
        self._began_at = 0
        self._profiler: Any = None

    def turn(self, step: int) -> None:
        """The step before `step` is over, and `step` begins now."""
        self._step.close()
        if self._ranges is not None and step not in self.steps:
            self._stop()
            self._write()
        if step in self.steps:
            if self._ranges is None:
                self._start(step)
            self._step.enter_context(record_function(f"{STEP}{step}"))

    def close(self) -> None:
        """End a recording that is under way; nothing of it is written."""
        self._step.close()
        if self._ranges is not None:
            self._stop()
            self._forget()

    def _start(self, step: int) -> None:
        self._began_at = step
        activities = [ProfilerActivity.CPU]
        if self.engine.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MEMORY_EVENTS)
        else:
            # its lines of progress look like errors among a run's; CUPTI's errors, on a GPU, are worth their noise
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._profiler = profile(activities=activities, profile_memory=True)
        self._ranges = ExitStack()
        self._ranges.enter_context(named_parts(self.engine))
        for owner, method, name in self.parts:
            self._ranges.enter_context(named_method(owner, method, name))
        self._profiler.start()

    def _stop(self) -> None:
        assert self._ranges is not None
        self._profiler.stop()
        self._ranges.close()
        self._ranges = None

    def _path(self, kind: str) -> Path:
        return profile_path(self.folder, self._began_at, self.rank, kind)

    def _write(self) -> None:
        """A profile that cannot be written does not end the run: a line says so."""
        first, last = self._began_at, self.steps[-1]
        what = f"profile of step {last}" if first == last else f"profile of steps {first} to {last}"
        try:
            self._path("").parent.mkdir(parents=True, exist_ok=True)
            self._write_files()
        except (OSError, ValueError) as error:  # a trace that the profiler could not write whole is no JSON
            self.say(f"warning: the {what} is not complete: {error}")
        else:
            self.say(f"{what}: {self._path('summary.txt')}")
        finally:
            self._forget()

    def _forget(self) -> None:
        self._profiler = None
        if self.engine.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write_files(self) -> None:
        device = self.engine.device.type
        if device == "cuda":
            self._write_snapshot()
        exported = self._export()
        self.still_alive()
        names = {name for _, _, name in self.parts}
        trace = Trace(exported["traceEvents"], names.union(MODEL_PARTS))
        summary = trace.summarise(device)
        exported["traceEvents"] += trace.backward_ranges()
        self.still_alive()
        write_whole(
            self._path("trace.json.gz"), gzip.compress(json.dumps(exported).encode(), compresslevel=5)
        )
        steps = self.steps[-1] - self._began_at + 1
        about = {
            "first_step": self._began_at,
            "steps": steps,
            "rank": self.rank,
            "device": device if device == "cpu" else torch.cuda.get_device_name(self.engine.device),
        }
        memory = {"state": _state_bytes(self.engine), "process_peak_bytes": process_peak()}
        tree = about | asdict(summary) | {"memory": asdict(summary.memory) | memory}
        write_whole(self._path("summary.json"), json.dumps(tree, indent=1).encode())
        write_whole(self._path("summary.txt"), table(summary, steps).encode())

    def _export(self) -> dict[str, Any]:
        """The profiler's trace, by way of a file: it gives it in no other form."""
        plain = beside(self._path("trace.json"), "partial")
        try:
            self._profiler.export_chrome_trace(str(plain))
            exported: dict[str, Any] = json.loads(plain.read_text(encoding="utf-8", errors="replace"))
            return exported
        finally:
            plain.unlink(missing_ok=True)

    def _write_snapshot(self) -> None:
        snapshot = self._path("memory.pickle")
        partial = beside(snapshot, "partial")
        try:
            torch.cuda.memory._dump_snapshot(str(partial))
            os.replace(partial, snapshot)
        finally:
            partial.unlink(missing_ok=True)


def _state_bytes(engine: Engine) -> dict[str, int]:
    """Bytes that this rank holds between steps: parameters, sums of gradients, masters, moments and an average."""
    parameters = {p.data_ptr(): p.nbytes for p in engine.model.parameters()}
    weights = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    held = [
        (kind, fragment.values[kind]) for fragment in engine.fragments().values() for kind in engine.kinds
    ]
    masters = [tensor for kind, stored in held if kind == "master" for tensor in stored.tensors]
    return {
        "parameters": sum(parameters.values()),
        "gradients": sum(sums.nbytes for sums in engine.gradient_sums()),
        # in float32 they lie in the weights themselves, split ones in part
        "masters": sum(m.nbytes for m in masters if m.untyped_storage().data_ptr() not in weights),
        "moments": sum(stored.nbytes for kind, stored in held if kind in MOMENTS),
        "average": sum(stored.nbytes for kind, stored in held if kind == AVERAGE),
    }
