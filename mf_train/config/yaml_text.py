"""YAML as configurations use it: safe, a key stands once, and a value means what it looks like.

YAML 1.1, which PyYAML reads, takes 0100 for 64, 1:30 for 90, 2024-11-30 for a date and `no` for false. Here whole
numbers are decimal (or 0x1f), and what is neither a number nor true, false or null is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_KEPT = ("null", "merge", "value")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|[0-9][0-9_]*)")
# YAML 1.1's without minutes and seconds; 1e-3 is text, and a key that is a number takes that
_FLOAT = re.compile(
    r"[-+]?([0-9][0-9_]*)\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)"
    r"|\.(nan|NaN|NAN)"
)
_OWN = ((_BOOL, "bool", "tTfF"), (_INT, "int", "-+0123456789"), (_FLOAT, "float", "-+0123456789."))


def parse_yaml(text: str) -> Any:
    """What a YAML text holds. Raises yaml.YAMLError, and ValueError for a number of too many digits."""
    return yaml.load(text, Loader=_Loader)


def yaml_text(tree: Any, width: int = 80) -> str:
    """YAML of plain dicts, lists and scalars, which `parse_yaml` and readers of YAML 1.1 read as the same tree."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)
    return text


class _Loader(yaml.SafeLoader):
    """`<<` merges of YAML 1.1 work."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 16 if "0x" in text else 10)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes also the text that only this loader takes for a number, such as '08'."""


def _resolve(kind: Any) -> None:
    for pattern, name, first in _OWN:
        whole = re.compile(f"(?:{pattern.pattern})\\Z")
        kind.add_implicit_resolver(f"{_TAG}{name}", whole, list(first))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.removeprefix(_TAG) in _KEPT]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_resolve(_Loader)
_resolve(_Dumper)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_number)
