"""Who may write into a run's `checkpoints/`: the newest start of the run, and none that was taken for dead.

A start writes a token of its own into `.writer`, then moves away what other starts were writing, and only then looks
for a checkpoint to resume from. A save goes into a folder named after its start's token; to complete it, the start
looks whether the token is still its own and then renames the folder. So a save of an older start is either complete
before the newer one looks, or its folder is gone and the rename fails.
"""

import json
import os
import secrets
import shutil
import socket
import time
from pathlib import Path

from mf_train.checkpoint.layout import LATEST, step_name
from mf_train.errors import TrainingError
from mf_train.files import remove_folder, write_whole

WRITER = ".writer"


class Fence:
    """One start's right to write into a `checkpoints/` folder. Its token is known to all ranks."""

    def __init__(self, folder: Path, token: str) -> None:
        self.folder = folder
        self.token = token

    def partial(self, step: int) -> Path:
        """The folder that a step's checkpoint is written into before it is complete."""
        return self.folder / f".{step_name(step)}.partial-{self.token}"

    def check(self) -> None:
        """Raises TrainingError where another start has taken the folder over since."""
        try:
            writer = json.loads((self.folder / WRITER).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TrainingError(
                f"{self.folder}: is not this run's any more ({WRITER} is gone); this one ends"
            ) from None
        except ValueError:
            writer = {}
        if writer.get("token") != self.token:
            raise TrainingError(
                f"{self.folder}: a newer start of this run (process {writer.get('pid')} on {writer.get('host')}, "
                f"{writer.get('started')}) has taken it over; this one ends without saving"
            )


def claim(folder: Path) -> Fence:
    """Take over a `checkpoints/` folder, which is made if need be, and delete what other starts left unfinished.

    For rank 0, before it looks for a checkpoint to resume from. Raises OSError, and TrainingError where another start
    came at the same time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fence = Fence(folder, secrets.token_hex(4))
    writer = {
        "token": fence.token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    text = (json.dumps(writer) + "\n").encode()
    try:
        write_whole(folder / WRITER, text, fence.token)
    except OSError:  # what an older start left unfinished may have filled the disk
        _remove_unfinished(folder)
        write_whole(folder / WRITER, text, fence.token)
    fence.check()
    _remove_unfinished(folder)
    return fence


def _remove_unfinished(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name.startswith(".step-"):
            remove_folder(path)
        elif path.name.startswith(".removed-"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(f".{LATEST}."):
            path.unlink(missing_ok=True)


def set_aside(checkpoint: Path, why: str) -> Path:
    """Rename a checkpoint to `NAME.why`, where nothing looks for one; returns the new path. Raises OSError."""
    place, number = checkpoint.with_name(f"{checkpoint.name}.{why}"), 1
    while place.exists():
        number += 1
        place = checkpoint.with_name(f"{checkpoint.name}.{why}-{number}")
    os.rename(checkpoint, place)
    return place
