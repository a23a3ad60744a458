"""The plain model's own source files as flat siblings, which is all that transformers' loader of code follows."""

import ast
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2]
_NAME = _PACKAGE.name

# Module of this package -> module beside config.json. What they import of the package must be here too.
MODULES = {
    "standalone.exported.configuration_memoryformer": "configuration_memoryformer",
    "standalone.exported.modeling_memoryformer": "modeling_memoryformer",
    "standalone.exported.names": "names",
    "standalone.exported.cache": "cache",
    "standalone.exported.growing_layer": "growing_layer",
    "standalone.exported.installed": "installed",
    "standalone.exported.operations": "operations",
    "config.model": "model_config",
    "kernels.composition": "composition",
    "model.attention": "attention",
    "model.block": "block",
    "model.head": "head",
    "model.initialise": "initialise",
    "model.loss_steps": "loss_steps",
    "model.memory": "memory",
    "model.model": "memoryformer",
    "model.norm": "norm",
    "model.norm_steps": "norm_steps",
    "model.quantized": "quantized",
    "model.sums": "sums",
}
# The choice of kernels stays behind: a standalone model computes with torch's operations and registers none, or with
# those of an installed package.
_REPLACED = {"kernels": "operations"}
# The only module that may load the package that is installed, by name and at run time: it works without one.
_LOADS_PACKAGE = "standalone.exported.installed"
_IMPORT = re.compile(rf"^(\s*from )({_NAME}\.[\w.]+)(?= import )", re.MULTILINE)


def source_files() -> dict[str, bytes]:
    """Contents of each source file by name, imports of this package rewritten to relative ones."""
    files = {}
    for module, flat in MODULES.items():
        path = _PACKAGE / f"{module.replace('.', '/')}.py"
        text = _IMPORT.sub(_relative, path.read_text(encoding="utf-8"))
        assert not _imports_package(text, module), f"{path}: imports {_NAME} in a form that is not rewritten"
        files[f"{flat}.py"] = text.encode()
    return files


def _relative(match: re.Match[str]) -> str:
    module = match[2].removeprefix(f"{_NAME}.")
    return f"{match[1]}.{_REPLACED.get(module) or MODULES[module]}"


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
