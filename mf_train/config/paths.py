"""Paths as people write them: `~`, `~user` and `$NAME` or `${NAME}` of the environment."""

import os
import re

from mf_train.errors import UserError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def expand_path(text: str, key: str) -> str:
    """The path or URL that `text` means; `key` is named in errors.

    Raises UserError for a user or a variable that is not there: a folder called `$SCRATCH` helps nobody.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise UserError(
                f"{key} is {text!r}: the environment variable {name} is not set: set it, or write its value"
            )
        return os.environ[name]

    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        user = text[1:].partition("/")[0]
        whose = f"of a user {user!r} " if user else ""
        raise UserError(
            f"{key} is {text!r}: no home folder {whose}is known: write the whole path, or ./{text}"
        )
    return _VARIABLE.sub(value, expanded)
