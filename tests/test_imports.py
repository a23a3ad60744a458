"""What may import what, and what every import needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

BareEnvironment = Callable[[list[str]], Path]

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "mf_train"

# Each part of the package, and the parts that it may import. It goes down only. BASE is for all but the lowest.
BASE = {
    "errors",
    "exit_status",
    "files",
    "control_groups",
    "host_memory",
    "processors",
    "progress",
    "run_folder",
    "stop_signals",
    "text",
    "versions",
}
BASE |= {"commands", "config"}
LAYERS = {
    **{name: set() for name in (*sorted(BASE - {"errors", "commands", "config"}), "drawing")},
    "errors": set(),
    "commands": {"errors"},
    "config": {"errors", "text"},
    "host_memory": {"control_groups"},
    "processors": {"control_groups"},
    "kernels": {"files", "processors"},
    "model": {"kernels", "config"},
    "parallel": BASE | {"model", "kernels"},
    "checkpoint": BASE | {"parallel", "model"},
    "data": BASE | {"checkpoint", "drawing"},
    "evaluation": {"errors", "text"},
    "telemetry": {"model", "kernels", "config"},
    "planning": BASE | {"checkpoint", "drawing", "parallel", "model"},
    "training": BASE
    | {"evaluation", "telemetry", "planning", "checkpoint", "data", "parallel", "model", "kernels"},
    "launch": BASE | {"training", "checkpoint", "data", "parallel", "planning", "model"},
    "quickstart": BASE,
    "reporting": BASE | {"launch", "checkpoint", "drawing"},
    "study": BASE | {"launch", "planning", "checkpoint", "parallel", "model", "drawing"},
    "standalone": BASE | {"evaluation", "checkpoint", "data", "model", "kernels"},
    "doctor": BASE | {"launch", "kernels"},
    "inspection": BASE | {"standalone", "telemetry", "checkpoint", "data", "model", "drawing"},
    "__main__": {"cli"},
}
LAYERS["cli"] = set(LAYERS) - {"__main__"}
# The same inside standalone/, for its folders and modules.
STANDALONE = {
    "exported": {"decoding"},  # at run time, where this package is installed
    "decoding": set(),
    "folder": {"exported"},
    "conversion": {"folder", "exported"},
    "use": {"folder", "exported", "decoding"},
    "arguments": {"conversion", "use"},
}

# Dependencies that are heavy, change often or are hard to install: one file each, or one folder.
ONE_FILE_EACH = [
    "deepspeed",
    "megatron",
    "sentencepiece",
    "datasets",
    "fsspec",
    "filelock",
    "scipy",
    "tokenizers",
    "matplotlib",
    "lm_eval",
    "wandb",
    "huggingface_hub",
]
ONE_FOLDER_EACH = {
    "pandas": "study",
    "pyarrow": "data",
    "transformers": "standalone",
    "triton": "kernels",
}
# Parts whose modules import nothing of other projects but these.
THIRD_PARTY = {"errors": set(), "config": {"yaml"}, "kernels": {"torch", "triton"}, "model": {"torch"}}
CORE_DISTRIBUTIONS = ["torch", "numpy", "pyyaml", "safetensors"]  # those that pip installs without an extra


def module_files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = {}
    for path in sorted((REPOSITORY / PACKAGE).rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = module_files()


def part_of(module: str) -> str:
    """`mf_train.model.block` -> `model`."""
    return module.split(".")[1] if "." in module else ""


@cache
def imported_modules(module: str) -> frozenset[str]:
    """Absolute names that a module's file imports, also inside functions and through importlib."""
    return frozenset(_imported_modules(module, MODULES[module]))


def _imported_modules(module: str, path: Path) -> Iterator[str]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [above, node.module or ""]))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ("import_module", "__import__", "find_spec") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def files_importing(name: str) -> set[str]:
    """Modules of the package that import the dependency `name` anywhere in their file."""
    return {
        module for module in MODULES if any(found.split(".")[0] == name for found in imported_modules(module))
    }


def run_python(python: str | Path, code: str, *arguments: str, cwd: Path = REPOSITORY) -> str:
    """Runs code with an empty environment, and sockets that may not connect; returns what it printed."""
    no_network = """
import socket
def refuse(*_): raise OSError("this import reached for the network")
socket.socket.connect = socket.socket.connect_ex = refuse
"""
    command = [str(python), "-c", no_network + code, *arguments]
    done = subprocess.run(command, cwd=cwd, env={}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Imports each module; with "apart" in a fork of one process that has the core dependencies already, so that no module
# profits from another's imports. Prints the failures: module, then the missing top-level package or the error.
IMPORT_EACH = """
import importlib, os, sys, traceback
import numpy, safetensors.torch, torch, yaml
def attempt(module):
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(module, (error.name or "").split(".")[0], flush=True)
    except BaseException:
        print(module, traceback.format_exc(), flush=True)
for module in sys.argv[2:]:
    if sys.argv[1] == "together":
        attempt(module)
        continue
    child = os.fork()
    if child == 0:
        attempt(module)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(module, "ended with status", status, flush=True)
"""


def test_the_package_has_modules() -> None:
    assert {"mf_train.errors", "mf_train.config", "mf_train.model"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    part = part_of(module)
    assert not part or part in LAYERS, f"say in LAYERS what {PACKAGE}.{part} may import"
    allowed = LAYERS.get(part, set()) | {part, ""}
    inside = {name for name in imported_modules(module) if name.split(".")[0] == PACKAGE}
    if not part:
        assert not inside, f"{PACKAGE}/__init__.py imports {sorted(inside)}, so every part would"
    # `from mf_train import __version__` names no part
    wrong = {name for name in inside if part_of(name) in LAYERS and part_of(name) not in allowed}
    assert not wrong, f"{module} may import {sorted(allowed - {''})} only, but imports {sorted(wrong)}"


@pytest.mark.parametrize(
    "module", [module for module in MODULES if module.startswith(f"{PACKAGE}.standalone.")]
)
def test_imports_inside_standalone(module: str) -> None:
    part = module.split(".")[2]
    inside = [name.split(".") for name in imported_modules(module)]
    wrong = {name[2] for name in inside if name[:2] == [PACKAGE, "standalone"] and len(name) > 2}
    wrong -= STANDALONE[part] | {part}
    assert not wrong, (
        f"{module} may import {sorted(STANDALONE[part])} of standalone only, but imports {sorted(wrong)}"
    )


def inside_a_part(part: str) -> dict[str, set[str]]:
    """The part's modules, and which others of the part each imports, wherever in its file."""
    modules = [module for module in MODULES if part_of(module) == part]
    graph: dict[str, set[str]] = {}
    for module in modules:
        found = set()
        for name in imported_modules(module):
            while name and name not in MODULES:
                name = name.rpartition(".")[0]  # the module that the imported thing is in
            found.add(name)
        # `from package import module` says nothing of the package's own file
        packages = {name for name in found if any(other.startswith(f"{name}.") for other in found)}
        graph[module] = {name for name in found - packages if part_of(name) == part} - {module}
    return graph


def folder_of(module: str) -> str:
    """`mf_train.data.text.readers` -> `mf_train.data.text`; a module of no folder in its part stays."""
    return ".".join(module.split(".")[:3])


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of the graph, [] if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_files_beside_the_modules_are_installed_with_them() -> None:
    tree = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    patterns = tree["tool"]["setuptools"]["package-data"][PACKAGE]
    folder = REPOSITORY / PACKAGE
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    shipped = {path for pattern in patterns for path in folder.glob(pattern)}
    assert files and not set(files) - shipped


def test_circles_are_found() -> None:
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize("part", LAYERS)
def test_no_circles_inside_a_part(part: str) -> None:
    """Neither of modules nor of a part's folders; an import inside a function counts."""
    graph = inside_a_part(part)
    folders: dict[str, set[str]] = defaultdict(set)
    for module, found in graph.items():
        folders[folder_of(module)] |= {folder_of(name) for name in found} - {folder_of(module)}
    assert not circle(graph), " -> ".join(circle(graph))
    assert not circle(folders), " -> ".join(circle(folders))


@pytest.mark.parametrize("part", sorted({part_of(module) for module in MODULES} - {"", "__main__"}))
def test_the_layout_names_every_part(part: str) -> None:
    layout = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Layout")[2]
    assert re.search(rf"`(mf_train/)?{part}(/|\.py)`", layout), f"{part} is not in CONTRIBUTING.md's layout"


@pytest.mark.parametrize("name", ONE_FILE_EACH)
def test_a_hostile_dependency_lives_in_one_file(name: str) -> None:
    assert len(files_importing(name)) <= 1, f"{name} is imported by {sorted(files_importing(name))}"


@pytest.mark.parametrize("name", ONE_FOLDER_EACH)
def test_a_hostile_dependency_lives_in_one_folder(name: str) -> None:
    wrong = {module for module in files_importing(name) if part_of(module) != ONE_FOLDER_EACH[name]}
    assert not wrong, f"{name} belongs in {ONE_FOLDER_EACH[name]}/, but {sorted(wrong)} import it"


@pytest.mark.parametrize("module", [module for module in MODULES if part_of(module) in THIRD_PARTY])
def test_lower_parts_need_little(module: str) -> None:
    roots = {name.split(".")[0] for name in imported_modules(module)}
    foreign = roots - sys.stdlib_module_names - {PACKAGE, "__future__"}
    assert foreign <= THIRD_PARTY[part_of(module)]


@pytest.mark.parametrize("how", ["together", pytest.param("apart", marks=pytest.mark.slow)])
def test_every_module_imports_with_the_core_dependencies(how: str, bare_environment: BareEnvironment) -> None:
    """Without environment variables and network, too.

    What needs an extra is imported when it is used; only that dependency's file may ask for it at once.
    """
    owners = defaultdict(set)
    for name in [*ONE_FILE_EACH, *ONE_FOLDER_EACH]:
        for module in files_importing(name):
            owners[module].add(name)
    failures = run_python(bare_environment(CORE_DISTRIBUTIONS), IMPORT_EACH, how, *MODULES).splitlines()
    unexpected = [line for line in failures if line.partition(" ")[2] not in owners[line.split(" ")[0]]]
    assert not unexpected, "\n".join(unexpected)
    assert run_python(sys.executable, IMPORT_EACH, how, *(line.split(" ")[0] for line in failures)) == ""


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["study", "collect", "configs/studies/sizes-small.yaml"], "pandas"),
        (["plan", "configs/tiny.yaml", "--plot", "scaling.png"], "matplotlib"),
        (["train", "configs/quickstart.yaml", "parallel.tensor=1"], "sentencepiece"),
        (["quickstart"], "deepspeed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_package_that_is_missing_is_named_in_one_line(
    bare_environment: BareEnvironment, arguments: list[str], missing: str
) -> None:
    command = [bare_environment(CORE_DISTRIBUTIONS), "-m", PACKAGE, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and f"{missing} is not installed" in line, line


def test_the_model_needs_torch_alone(bare_environment: BareEnvironment) -> None:
    code = """
import importlib.util
absent = "deepspeed megatron datasets transformers sentencepiece yaml safetensors pytest"
for name in absent.split():
    assert importlib.util.find_spec(name) is None, name
try:
    import deepspeed
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("deepspeed can be imported")

import torch
from mf_train.model import MemoryFormer, ModelConfig
config = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, bits=4, expand_bits=1, vocab_size=64)
tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
logits = MemoryFormer(config)(tokens)
assert logits.shape == (2, 8, 64) and bool(torch.isfinite(logits).all())
logits.square().mean().backward()
print("ok")
"""
    assert run_python(bare_environment(["torch"]), code).strip() == "ok"
