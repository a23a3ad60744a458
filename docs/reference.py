"""Writes reference.md from the code: `python docs/reference.py` in the repository's folder."""

import argparse
import ast
import inspect
import re
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mf_train.cli import build_parser
from mf_train.config import Config
from mf_train.files import write_whole

PAGE = Path(__file__).with_name("reference.md")
HEAD = """# Reference

Written from the code by `python docs/reference.py`: change it there. [Keys](#model) are those of a configuration, and
`section.key=value` on the command line replaces one; [commands](#commands) follow. The pages in [the README's
list](../README.md) say when to use them.

"""


PARAGRAPH = "\n\n"
BAR = "\\|"  # inside a table's cell


def render() -> str:
    """The page."""
    return HEAD + "\n".join([*key_lines(Config, ""), "## Commands\n", *command_lines(build_parser())])


def key_lines(section: type, prefix: str, names: str = "") -> Iterator[str]:
    """A table of a section's keys, then those of the sections in it; `names`: what `prefix` stands for."""
    hints, comments = get_type_hints(section), comments_of(section)
    inherited = {field.name for base in section.__bases__ if is_dataclass(base) for field in fields(base)}
    rows, inner = [], dict[type, list[str]]()
    for field in fields(section):
        if field.name in inherited:
            continue
        kind = hints[field.name]
        nested = element_of(kind) or kind
        if is_dataclass(nested):
            inner.setdefault(nested, []).append(f"{field.name}{'[]' if element_of(kind) else ''}")
        if not is_dataclass(kind):
            meaning = comments.get(field.name, "").replace("None:", "null:")
            values = ", ".join(filter(None, (words_of(kind), bound_of(field))))
            cells = (f"`{prefix}{field.name}`", values, f"`{default_of(field)}`", meaning)
            rows.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    if prefix:
        yield f"## {prefix.rstrip('.')}\n"
        yield f"{(inspect.getdoc(section) or '').partition(f'{PARAGRAPH}Raises')[0]}{names}\n"
        if inherited:
            yield "Its other keys are those of a source of training text.\n"
        if rows:
            yield "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])
    for nested, where in inner.items():
        if len(where) == 1:
            yield from key_lines(nested, f"{prefix}{where[0]}.")
        else:
            listed = ", ".join(
                f"`{name}` ({comments[name]})" if comments.get(name) else f"`{name}`" for name in where
            )
            yield from key_lines(
                nested, f"{prefix}NAME.", f"{PARAGRAPH}NAME: {listed.replace('None:', 'null:')}."
            )


def comments_of(section: type) -> dict[str, str]:
    """The comment of each field: behind it, or on the lines above it."""
    lines, _ = inspect.getsourcelines(section)
    source = "".join(lines)
    tokens = list(tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__))
    behind = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    alone = {row for row, token in behind.items() if not lines[row - 1][: token.start[1]].strip()}
    found = {}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    for each in body.body:
        if not (isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)):
            continue
        first, last = each.lineno, each.end_lineno or each.lineno
        rows = [row for row in range(first, last + 1) if row in behind]
        while not rows and first - 1 in alone:
            first -= 1
        rows = rows or list(range(first, each.lineno))
        found[each.target.id] = " ".join(behind[row].string.lstrip("# ") for row in rows)
    return found


def element_of(kind: Any) -> Any:
    """The type of a tuple's elements, where it may have any number of them."""
    arguments = get_args(kind)
    return arguments[0] if get_origin(kind) is tuple and arguments[1:] == (...,) else None


def words_of(kind: Any) -> str:
    """A type in words."""
    if element := element_of(kind):
        return f"list of {words_of(element)}"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {len(get_args(kind))} {words_of(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "mapping"
    if arguments := get_args(kind):
        return " or ".join(words_of(each) for each in arguments)
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return "mapping" if is_dataclass(kind) else names[kind]


def default_of(field: Field[Any]) -> str:
    """A field's default as YAML has it."""
    value = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
    if isinstance(value, tuple):
        return str(list(value))
    words = {None: "null", True: "true", False: "false", "": "''"}
    return words[value] if value is None or isinstance(value, bool) or value == "" else f"{value}"


def bound_of(field: Field[Any]) -> str:
    """The values that a field may have."""
    bound = field.metadata.get("bound")
    return "" if bound is None else re.sub(r"^it must be (a number,? )?", "", bound.words)


def command_lines(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Each command with its arguments, then its verbs."""
    arguments = [each for each in parser._actions if each.help != argparse.SUPPRESS]
    verbs = [each for each in arguments if isinstance(each, argparse._SubParsersAction)]
    own = [each for each in arguments if each not in verbs and "--help" not in each.option_strings]
    if " " in parser.prog:
        if own or not verbs:
            yield f"### {parser.prog}\n"
            yield f"{parser.description}\n"
            rows = [
                f"| `{name_of(each)}` | {(each.help or '').replace('|', 'or').replace('%%', '%')} |"
                for each in own
            ]
            yield "\n".join(["| argument | meaning |", "|---|---|", *rows, ""])
            yield f"    {(parser.epilog or '').removeprefix('example: ')}\n"
    beside = getattr(parser, "with_verb", None)
    for action in [*verbs, *(beside._actions if beside else ())]:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from command_lines(verb)


def name_of(action: argparse.Action) -> str:
    """How an argument is written."""
    name = ", ".join(action.option_strings)
    if action.nargs == 0:
        return name
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    value = value if isinstance(value, str) else " ".join(value)
    many = f"[{value} ...]" if action.nargs == "*" else f"{value} ..." if action.nargs == "+" else value
    return f"{name} {many}".strip().replace("|", " or ")


if __name__ == "__main__":
    write_whole(PAGE, render().encode())
