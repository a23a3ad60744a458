"""What the packages' verbs share on the command line: a summary, an example, a configuration, lines as output."""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from mf_train.errors import UserError

Run = Callable[[argparse.Namespace], int]


class CommandParser(argparse.ArgumentParser):
    """A command's parser. Its verbs may stand beside arguments of its own: `launch status RUN` and `launch CONFIG`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.with_verb = argparse.ArgumentParser(prog=self.prog)
        self._verbs: Any = None

    def add_verbs_beside(self) -> Any:
        """Returns what `add_command` takes to add a verb; the first word decides whether it is one."""
        self._verbs = self.with_verb.add_subparsers(metavar="verb", required=True)
        return self._verbs

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse hands a command's words to this method of its parser."""
        if args and self._verbs is not None and args[0] in self._verbs.choices:
            return self.with_verb.parse_known_args(args, namespace)
        return super().parse_known_args(args, namespace)


def add_command(commands: Any, name: str, summary: str, example: str, run: Run) -> CommandParser:
    """Add a command to `commands` (`add_subparsers`' result); `run` does it and returns the exit status."""
    parser: CommandParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example: memoryformer {example}",
    )
    parser.set_defaults(run=run)
    return parser


def add_verbs(commands: Any, name: str, summary: str) -> Any:
    """Add a command that has verbs; returns what `add_command` takes to add one."""
    return commands.add_parser(name, help=summary).add_subparsers(metavar="verb", required=True)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG and the settings behind it: `config` and `overrides`, as `load_config` takes them."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's"
    )


def refuse_with(given: argparse.Namespace, what: str, **defaults: object) -> None:
    """Raises UserError where an option that `what` does not use was given."""
    for name, default in defaults.items():
        if getattr(given, name) != default:
            raise UserError(f"--{name.replace('_', '-')} does not go with {what}: leave it out")


def print_lines(lines: Iterable[str]) -> int:
    """Print lines as they come; returns the exit status of a command that did what was asked."""
    for line in lines:
        print(line, flush=True)
    return 0
