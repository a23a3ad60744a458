"""`python at_event.py SIGNAL NUMBER PATTERN ARGUMENTS...`: memoryformer ARGUMENTS, struck before a change of files.

From the first save on, every change of the file system that Python makes is a line, such as
"os.rename FROM TO"; before the NUMBER-th that matches PATTERN is made, the process sends itself SIGNAL. Only rank 0
does. See sys.addaudithook and the audit events table of Python's documentation; writes to open files raise no event.
"""

import os
import re
import runpy
import signal
import sys
import threading
from typing import Any

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def main() -> None:
    number, wanted, pattern = signal.Signals[sys.argv[1]], int(sys.argv[2]), re.compile(sys.argv[3])
    sys.argv[:] = ["memoryformer", *sys.argv[4:]]
    saving, seen = False, 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal saving, seen
        if event == "open":
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not isinstance(arguments[0], str):
                return
        elif event not in _CHANGES:
            return
        line = " ".join(
            [event, *(str(argument) for argument in arguments[:2] if not isinstance(argument, int))]
        )
        saving = saving or (event == "os.mkdir" and "checkpoints/.step-" in line)
        if not saving or not pattern.search(line):
            return
        seen += 1
        if seen == wanted:
            os.write(2, f"struck before {line}\n".encode())
            signal.pthread_kill(threading.get_ident(), number)  # takes effect before it returns

    if os.environ.get("RANK", "0") == "0":
        sys.addaudithook(hook)
    runpy.run_module("mf_train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
