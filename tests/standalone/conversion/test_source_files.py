"""Which files a converted model gets, and what their imports become."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mf_train.standalone import exported
from mf_train.standalone.conversion import source_files as module
from mf_train.standalone.conversion.source_files import source_files


def test_source_files_need_only_each_other() -> None:
    files = {name: content.decode() for name, content in source_files().items()}
    relative = re.compile(r"^\s*from \.(\w*) import", re.MULTILINE)
    for name, text in files.items():
        assert "from mf_train" not in text and "import mf_train" not in text, name
        assert "custom_op" not in text, name
        assert all(f"{module}.py" in files for module in relative.findall(text)), name
    needed, waiting = set(), ["modeling_memoryformer"]
    while waiting:
        module = waiting.pop()
        if module not in needed:
            needed.add(module)
            waiting += relative.findall(files[f"{module}.py"])
    assert {f"{module}.py" for module in needed} == files.keys()


def test_every_module_of_exported_is_copied() -> None:
    names = {path.name for path in Path(exported.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert {"configuration_memoryformer.py", "modeling_memoryformer.py", "installed.py"} <= names
    assert names <= source_files().keys()


PLAIN = "from mf_train.model.plain import Plain\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one exported module, which imports one of the plain model's."""
    package = tmp_path / "mf_train"
    for folder in ("standalone/exported", "model", "config"):
        (package / folder).mkdir(parents=True)
    (package / "standalone/exported/__init__.py").write_text("")
    (package / "standalone/exported/wrapper.py").write_text(PLAIN)
    (package / "model/plain.py").write_text("Plain = 1\n")
    monkeypatch.setattr(module, "_PACKAGE", package)
    return package


def test_imports_are_followed_and_rewritten(package: Path) -> None:
    (package / "model/plain.py").write_text(
        "def late():\n    from mf_train.model.model import (\n        Model,\n    )\n"
    )
    (package / "model/model.py").write_text("from mf_train.model.plain import late\nModel = 1\n")
    assert source_files() == {
        "wrapper.py": b"from .plain import Plain\n",
        "plain.py": b"def late():\n    from .memoryformer import (\n        Model,\n    )\n",
        "memoryformer.py": b"from .plain import late\nModel = 1\n",
    }


@pytest.mark.parametrize(
    "text",
    [
        "import mf_train.model.plain\n",
        "from mf_train import model\n",
        "import importlib\nimportlib.import_module('mf_train.model')\n",
    ],
)
def test_an_import_that_cannot_be_rewritten_is_refused(text: str, package: Path) -> None:
    (package / "model/plain.py").write_text(text)
    with pytest.raises(
        AssertionError, match=r"mf_train\.model\.plain: imports mf_train in a form that is not"
    ):
        source_files()


def test_a_package_that_is_imported_has_no_copy(package: Path) -> None:
    (package / "model/plain.py").write_text("from mf_train.config import Config\n")
    with pytest.raises(FileNotFoundError, match=r"config\.py"):
        source_files()


def test_two_modules_of_one_name_are_refused(package: Path) -> None:
    (package / "model/plain.py").write_text("from mf_train.config.wrapper import Config\n")
    (package / "config/wrapper.py").write_text("Config = 1\n")
    with pytest.raises(AssertionError, match=r"wrapper\.py too"):
        source_files()
