"""The command line: the verbs of all packages, and how each kind of error ends."""

import argparse
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Sequence

from mf_train.checkpoint.arguments import add_checkpoint
from mf_train.commands import CommandParser
from mf_train.data.arguments import add_data, add_tokenizer
from mf_train.doctor.arguments import add_doctor
from mf_train.errors import PeerError, TrainingError, UserError
from mf_train.exit_status import FAILED, INTERRUPTED, MISTAKE
from mf_train.inspection.arguments import add_inspect
from mf_train.launch.arguments import add_launch
from mf_train.parallel.launcher import end_with_launcher
from mf_train.planning.arguments import add_plan
from mf_train.quickstart.arguments import add_quickstart
from mf_train.reporting.arguments import add_report
from mf_train.standalone.arguments import add_average, add_convert, add_evaluate, add_generate
from mf_train.study.arguments import add_study
from mf_train.training.arguments import add_train

_PEER_WAIT_SECONDS = 5.0
# each adds its command to the parser; what a command needs is imported when it runs
_COMMANDS = (
    add_quickstart,
    add_train,
    add_tokenizer,
    add_data,
    add_convert,
    add_generate,
    add_evaluate,
    add_inspect,
    add_launch,
    add_plan,
    add_report,
    add_study,
    add_doctor,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failure, 2 the user's mistake, 75 stopped on request after saving."""
    end_with_launcher()
    options = _parse(build_parser(), arguments)
    try:
        status = options.run(options)
    except UserError as error:
        _speak(str(error))
        status = MISTAKE
    except (TrainingError, OSError) as error:
        if not (isinstance(error, BrokenPipeError) and _nobody_listens()):
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            _speak(f"{error}; make room and run again" if full else str(error))
        status = FAILED
    except ModuleNotFoundError as error:
        if (error.name or "mf_train").split(".")[0] == "mf_train":
            raise
        extras = "mf-train[train,standalone,study,evaluation]"
        _speak(
            f"the package {error.name} is not installed; pip install '{extras}' has all that commands need"
        )
        status = MISTAKE
    except PeerError as error:
        status = error.status
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.stdout.flush()
    sys.exit(status)


def _nobody_listens() -> bool:
    """Whether the reader of standard output, such as head, has seen enough; then what is left is dropped."""
    output = select.poll()
    output.register(1, 0)  # nothing but that the other end is closed
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides, a prompt and `convert`'s OUT may stand behind options, where argparse alone does not take what may be
    absent.
    """
    options, rest = parser.parse_known_args(arguments)
    for name in ("prompt", "out"):
        if rest and getattr(options, name, "") is None and not rest[0].startswith("-"):
            setattr(options, name, rest.pop(0))
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _speak(message: str) -> None:
    """One line to standard error, by one rank.

    A mistake that every rank sees is rank 0's to tell: the others wait until their launcher has ended them, and
    speak only if they are still there, because then the mistake was theirs alone.
    """
    from mf_train.parallel.processes import find_process

    try:
        rank = find_process().rank
    except UserError:
        rank = 0
    if rank != 0:
        # a launcher's request to end is not one to save any more
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_PEER_WAIT_SECONDS)
    print(f"memoryformer: {message}", file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="memoryformer",
        description="Pretrain MemoryFormer language models, and use what comes out.",
        epilog="Each command's --help shows an example.",
    )
    commands = parser.add_subparsers(metavar="command", required=True, parser_class=CommandParser)
    for add in _COMMANDS:
        add(commands)
    add_average(add_checkpoint(commands))  # which computes a probe: more than `checkpoint` may import
    return parser
