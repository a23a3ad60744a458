"""A part whose steps do what they are called: `python -m tests.benchmarks.a_part fine fail crash hang ...`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.gpu.steps import DEVICE_LOST, PartialError, Steps, part_arguments


def do(name: str, folder: Path) -> Mapping[str, object]:
    kind = name.split("-")[0]
    if kind == "fail":
        raise ValueError("a wrong number")
    if kind == "memory":
        raise RuntimeError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB. If reserved, then more"
        )
    if kind == "partly":
        raise PartialError({"first": 1}, {"second": "a wrong number"})
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang":
        time.sleep(600)
    if kind == "lost":
        sys.exit(DEVICE_LOST)
    if kind == "leave":
        print("the last words", file=sys.stderr)
        os._exit(9)
    if kind == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / "child").write_text(str(child.pid))
        time.sleep(600)
    return {"number": len(name)}


def main() -> None:
    parser = part_arguments(__doc__)
    parser.add_argument("names", nargs="+")
    options = parser.parse_args()
    if options.names == ["broken"]:
        raise ImportError("a library is broken")
    steps = Steps(options.results)
    for name in options.names:
        steps.run(name, lambda name=name: do(name, options.folder))


if __name__ == "__main__":
    main()
