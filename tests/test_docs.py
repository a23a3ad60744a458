"""The documents stay true: links lead somewhere, commands parse, quoted messages are the code's, examples run."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from mf_train import __version__
from mf_train.cli import _parse, build_parser
from mf_train.config import Config
from mf_train.config.loading import load_config, parse_config
from mf_train.config.yaml_text import parse_yaml
from mf_train.drawing import make_png
from mf_train.model.counts import count_block_flops, count_parameters
from mf_train.parallel.degrees import check_degrees

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "mf_train"
PAGES = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("launch/*.md")]
# a tokenizer's attributes in transformers look like keys
SECTIONS = "|".join(field.name for field in fields(Config) if field.name != "tokenizer")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_spans(page: Path) -> list[str]:
    return re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    )


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), f"{page.name}: {target} does not exist"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target} names no heading"


def test_the_site_has_every_page_in_its_order() -> None:
    _, _, nav = text_of(REPOSITORY / "mkdocs.yml").partition("\nnav:\n")
    named = re.findall(r"^ +- (\S+\.md)$", nav, re.MULTILINE)
    pages = {str(page.relative_to(REPOSITORY)).removeprefix("docs/") for page in PAGES}
    assert sorted(named) == sorted(pages)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make site installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = text_of(tmp_path / "site" / "architecture.html")
    assert "<math" in page and "```math" not in page and 'src="architecture-layer.png"' in page
    assert 'href="CONTRIBUTING.html' in text_of(tmp_path / "site" / "index.html")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_exist(page: Path) -> None:
    files = [
        "/" + path.relative_to(REPOSITORY).as_posix()
        for path in REPOSITORY.rglob("*.py")
        if ".venv" not in path.parts
    ]
    for span in code_spans(page):
        if re.fullmatch(r"[\w/]+/\w+\.py", span):
            assert any(file.endswith(f"/{span}") for file in files), f"{page.name}: there is no {span}"


def config_keys(section: Any, prefix: str = "") -> set[str]:
    """All dotted keys of a configuration, sections among them."""
    found = set()
    for name, kind in get_type_hints(section).items():
        found.add(prefix + name)
        if is_dataclass(kind):
            found |= config_keys(kind, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_keys_exist(page: Path) -> None:
    keys = config_keys(Config)
    for span in code_spans(page):
        named = re.match(rf"((?:{SECTIONS})\.[a-z_.]+)(?:=|: |$)", span)
        if named and not named[1].endswith((".py", ".md", ".jsonl", ".safetensors", ".model")):
            assert named[1] in keys, f"{page.name}: there is no key {named[1]}"


def commands() -> list[list[str]]:
    """The words of each command in an indented block, without what stands for more of them."""
    found = []
    for page in PAGES:
        for line in text_of(page).replace("\\\n", " ").splitlines():
            if line.startswith("    memoryformer "):
                found.append([word for word in shlex.split(line, comments=True)[1:] if word != "..."])
    return found


def test_commands_are_accepted() -> None:
    assert len(commands()) > 50
    for words in commands():
        try:
            _parse(build_parser(), words)
        except SystemExit:
            pytest.fail(f"memoryformer {shlex.join(words)}")


def test_the_tutorial_s_configuration_loads() -> None:
    (content,) = re.findall(
        r"^```yaml\n(.*?)^```$", text_of(REPOSITORY / "docs/tutorial.md"), re.DOTALL | re.MULTILINE
    )
    config = parse_config(parse_yaml(content), "my.yaml")
    check_degrees(config, 2)
    check_degrees(config, 8)
    assert count_parameters(config.model).total == 14_689_664  # as the tutorial's output says


def message_texts() -> list[str]:
    """Every string of the package in one line, a NUL for each value that is put in."""
    found = [text_of(PACKAGE / "launch/train.sbatch")]
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_said(message: str, text: str) -> bool:
    """Whether a text of the package says a message, in which "..." stands for what differs."""
    place = 0
    for part in filter(None, (part.strip() for part in message.split("..."))):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_quoted_messages_are_the_code_s() -> None:
    texts = message_texts()
    quoted = re.findall(r"^> (.*)$", text_of(REPOSITORY / "docs/troubleshooting.md"), re.MULTILINE)
    assert len(quoted) > 20
    for message in quoted:
        assert any(is_said(message, text) for text in texts), message
    assert not any(is_said("step ... has a loss that nobody likes", text) for text in texts)


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_the_table_of_models_is_counted(name: str) -> None:
    model = load_config(REPOSITORY / f"configs/{name}.yaml").model
    flops = [count_block_flops(replace(model, kind=kind)).layers / 1e9 for kind in ("dense", "memoryformer")]
    row = [model.num_layers, model.hidden_size, model.num_heads, model.num_tables]
    row += [f"{model.bits}, {model.expand_bits}", f"{count_parameters(model).tables / 1e9:.3f} B"]
    row += [f"{flops[0]:.1f}, {flops[1]:.1f}"]
    written = " | ".join(map(str, row))
    assert f"| {name} | {written} |\n" in text_of(REPOSITORY / "docs/architecture.md"), written


def test_the_pictures_can_be_drawn() -> None:
    drawn = runpy.run_path(str(REPOSITORY / "docs/draw.py"))
    for draw in (drawn["draw_layer"], drawn["draw_processes"]):
        assert make_png(draw()).startswith(b"\x89PNG")
    assert drawn["draw_study"]().startswith(b"\x89PNG")


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {__version__}\n" in text_of(REPOSITORY / "CITATION.cff")
    assert f"\n## {__version__} " in text_of(REPOSITORY / "CHANGELOG.md")


def change(package: Path, diff: str) -> None:
    """Put a diff without line numbers into practice: each piece, between lines @@, is found once in the file."""
    name, *lines = diff.splitlines(keepends=True)
    path = package.parent / name.removeprefix("--- ").strip()
    text = text_of(path)
    for piece in "".join(lines).split("@@\n"):
        old, new = (
            "".join(line[1:] for line in piece.splitlines(keepends=True) if line[0] in marks)
            for marks in (" -", " +")
        )
        assert text.count(old) == 1, f"{path}: {text.count(old)} times\n{old}"
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def test_the_examples_of_extending_run(tmp_path: Path) -> None:
    package, checks = tmp_path / "mf_train", []
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    fenced = re.findall(
        r"^```(diff|python)\n(.*?)^```$", text_of(REPOSITORY / "docs/extending.md"), re.DOTALL | re.MULTILINE
    )
    for language, content in fenced:
        first, _, rest = content.partition("\n")
        if language == "diff":
            change(package, content)
        elif first == "# check":
            checks.append(rest)
        else:
            path = tmp_path / first.removeprefix("# ")
            assert not path.exists()
            path.write_text(rest, encoding="utf-8")
    assert len(checks) == 4
    (tmp_path / "check.py").write_text("\n".join(checks), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "check.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_reference_is_the_code_s() -> None:
    written = runpy.run_path(str(REPOSITORY / "docs" / "reference.py"))["render"]()
    assert text_of(REPOSITORY / "docs" / "reference.md") == written, "run python docs/reference.py"
