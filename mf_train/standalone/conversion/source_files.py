"""The code of a converted model: `exported/` and what it imports of the plain model, as flat siblings.

Siblings that import each other relatively are all that transformers' loader of code follows.
"""

import ast
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2]
_NAME = _PACKAGE.name

_EXPORTED = f"{_NAME}.standalone.exported"  # its modules are copied, and every module of this package that they import
# A copy has its module's last name, but these, whose last name would say little beside config.json.
_FLAT_NAMES = {
    f"{_NAME}.config.model": "model_config",
    f"{_NAME}.model.model": "memoryformer",
    f"{_NAME}.model.attention.base": "attention",
    f"{_NAME}.model.attention.kinds": "attention_kinds",
}
# The choice of kernels stays behind: a standalone model computes with torch's operations and registers none, or with
# those of an installed package.
_REPLACED = {f"{_NAME}.kernels": f"{_EXPORTED}.operations"}
# The only module that may load the package that is installed, by name and at run time: it works without one.
_LOADS_PACKAGE = f"{_EXPORTED}.installed"
_IMPORT = re.compile(rf"^(\s*from )({_NAME}\.[\w.]+)(?= import )", re.MULTILINE)


def source_files() -> dict[str, bytes]:
    """Contents of each source file by name, imports of this package rewritten to relative ones."""
    files: dict[str, bytes] = {}
    copied: set[str] = set()
    waiting = [
        f"{_EXPORTED}.{path.stem}" for path in _path(_EXPORTED).glob("*.py") if path.stem != "__init__"
    ]
    while waiting:
        module = waiting.pop()
        if module in copied:
            continue
        copied.add(module)
        text = _path(module).with_suffix(".py").read_text(encoding="utf-8")
        waiting += [_copied(match[2]) for match in _IMPORT.finditer(text)]
        text = _IMPORT.sub(lambda match: f"{match[1]}.{_flat(_copied(match[2]))}", text)
        assert not _imports_package(text, module), (
            f"{module}: imports {_NAME} in a form that is not rewritten"
        )
        name = f"{_flat(module)}.py"
        assert name not in files, (
            f"{module}: another copied module is {name} too; give it a name in _FLAT_NAMES"
        )
        files[name] = text.encode()
    return files


def _path(module: str) -> Path:
    """The folder of a package; with ".py" the file of a module."""
    return _PACKAGE.parent / module.replace(".", "/")


def _copied(module: str) -> str:
    """The module whose copy a converted model imports for `module`."""
    return _REPLACED.get(module, module)


def _flat(module: str) -> str:
    return _FLAT_NAMES.get(module) or module.rpartition(".")[2]


def _imports_package(text: str, module: str) -> bool:
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if module != _LOADS_PACKAGE:
                names += [str(each.value) for each in node.args if isinstance(each, ast.Constant)]
    return any(name.split(".")[0] == _NAME for name in names)
