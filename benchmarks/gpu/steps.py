"""The steps of one part: each leaves a line of JSON when it begins and another when it ends.

So what a part found is on disk whatever becomes of its process, and a process that is started again goes on behind
the step that ended the one before.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mf_train.run_folder import read_records

Line = dict[str, Any]
DEVICE_LOST = 3  # exit status: an error of CUDA after which every later call in this process fails too


class PartialError(Exception):
    """A step's values, some of which could not be found: the reasons are the message."""

    def __init__(self, values: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
        self.values = dict(values)


class Steps:
    """What a part's process writes to its results file.

    A line is `{"step": NAME, "began": seconds}`, then `{"step": NAME, "seconds": s}` with an object as `"values"`, or
    a reason as `"error"` or `"skipped"`. A step that failed in part has values and an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = {line["step"] for line in read_records(path)}

    def run(self, name: str, step: Callable[[], Mapping[str, Any]]) -> None:
        """Run a step, unless an earlier process of this part began it. An exception becomes the step's error."""
        if name in self.known:
            return
        self.begin(name)
        began = time.perf_counter()
        found: dict[str, Any]
        try:
            found = {"values": dict(step())}
        except PartialError as error:
            found = {"values": error.values, "error": str(error)}
        except Exception as error:  # whatever it is, the next step is tried
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            found = {"error": describe(error)}
        self.end(name, time.perf_counter() - began, **found)
        leave_if_device_lost()

    def begin(self, name: str) -> None:
        self._write({"step": name, "began": time.time()})

    def end(self, name: str, seconds: float, **found: Any) -> None:
        self._write({"step": name, "seconds": seconds, **found})

    def _write(self, line: Line) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def describe(error: BaseException) -> str:
    """An exception in one line. Out of memory is said with the numbers of torch's message alone."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "out of memory" in text:
        sentences = text.split(". ")
        text = ". ".join(sentences[:3])
    elif not isinstance(error, (RuntimeError, SystemExit)):
        text = f"{type(error).__name__}: {text}"
    return text[:400]


def leave_if_device_lost() -> None:
    """End this process where CUDA answers no more, so that the next step gets a process of its own."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the device is lost to this process: {describe(error)}", file=sys.stderr, flush=True)
        sys.exit(DEVICE_LOST)


def part_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every part takes. SIGUSR1 prints where each of its threads stands."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="file that gets a line of JSON a step")
    parser.add_argument(
        "--folder", type=Path, help="where files that are kept go (default: beside --results)"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="small sizes on the CPU, Triton in its interpreter: no figures",
    )
    return parser
