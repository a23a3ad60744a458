"""`convert --upload`, against a server on this machine that answers as the hub does."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mf_train.cli import main
from mf_train.config import ModelConfig
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.folder import CERTIFICATE, INDEX, SINGLE
from tests.processes import run_python
from tests.standalone.checkpoints import flip, random_weights, write_checkpoint
from tests.standalone.hub import TOKEN, Hub, running_hub

SMALL = ModelConfig(hidden_size=32, num_layers=1, num_heads=4, bits=2, vocab_size=4096, sequence_length=24)
NAME = "me/small-model"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the model that it was converted to."""
    folder = tmp_path_factory.mktemp("converted")
    checkpoint = write_checkpoint(folder / "step-000000007", SMALL, random_weights(SMALL, seed=2), tensor=1)
    list(convert(checkpoint, folder / "model", license_name="cc-by-4.0"))
    return checkpoint, folder / "model"


@pytest.fixture
def model(converted: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(converted[1], tmp_path / "model"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as found:
        # what HF_ENDPOINT, HF_HUB_DISABLE_XET and HF_HUB_OFFLINE say when huggingface_hub is imported
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["convert", *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def complaint(status: int, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command ends with, behind bars of what was sent."""
    capsys.readouterr()
    assert command(*arguments) == status
    *bars, found = capsys.readouterr().err.splitlines()
    assert found.startswith("memoryformer: ") and all("%|" in bar for bar in filter(None, bars)), (
        bars,
        found,
    )
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_is_converted_and_sent(
    converted: tuple[Path, Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As users call it, in a process of its own; options may stand before OUT."""
    for name, value in (("HF_ENDPOINT", hub.url), ("HF_HUB_DISABLE_XET", "1"), ("HF_HUB_OFFLINE", "0")):
        monkeypatch.setenv(name, value)
    code = "import sys; from mf_train.cli import main; main(sys.argv[1:])"
    options = ("--upload", NAME, "--private")
    said = run_python(code, "convert", converted[0], *options, tmp_path / "out")
    files = contents(tmp_path / "out")
    assert hub.repositories[NAME] == {".gitattributes": b""} | files and hub.private[NAME]
    assert f"sent {len(files)} files, " in said and said.rstrip().endswith(f"to {hub.url}/{NAME} (private)")
    assert len(hub.stored) == 1 and sum("/commit/" in each for each in hub.asked) == 1


def test_a_model_is_sent_again(model: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """What its owner wrote is sent, weights of an earlier model go, and other files of the repository stay."""
    hub.private[NAME] = False
    hub.repositories[NAME] = {
        "LICENSE": b"text",
        INDEX: b"{}",
        "model-00001-of-00002.safetensors": b"old",
        SINGLE: b"old",
    }
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (model / ".hidden").touch()
    assert command(model, "--upload", NAME) == 0
    said = capsys.readouterr().out
    assert "sent as they are now, and not as converted: README.md, chat_template.jinja" in said
    sent = {name: data for name, data in contents(model).items() if name != ".hidden"}
    assert hub.repositories[NAME] == sent | {"LICENSE": b"text"}


def test_a_dry_run_asks_nobody(
    converted: tuple[Path, Path],
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    model = converted[1]
    assert command(model, "--upload", NAME, "--private", "--dry-run") == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == f"would send to {hub.url}/{NAME} (private):" and not hub.asked
    assert [line.split()[-1] for line in lines] == sorted(path.name for path in model.iterdir())
    assert last.startswith(f"{len(lines)} files, ") and last.endswith("dry run: nothing was sent")
    size = (model / "tokenizer.json").stat().st_size
    assert f"  {size / 1e3:>7.1f} kB  tokenizer.json" in lines


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("tensor", "tensor model."),
        ("code", "modeling_memoryformer.py is not what was converted"),
        ("weights gone", f"{SINGLE}: missing"),
        ("file gone", "tokenizer.json is missing"),
        ("certificate gone", f"{CERTIFICATE}: missing"),
        ("stray", "more.safetensors is a file of weights that no index names"),
        ("folder", "custom_generate is not a file"),
    ],
)
def test_a_folder_that_is_not_whole_is_not_sent(
    damage: str, message: str, model: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "tensor":
        flip(model / SINGLE)
    elif damage == "code":
        with (model / "modeling_memoryformer.py").open("a") as file:
            file.write("\n")
    elif damage == "stray":
        shutil.copy(model / SINGLE, model / "more.safetensors")
    elif damage == "folder":
        (model / "custom_generate").mkdir()
    else:
        names = {"weights": SINGLE, "file": "tokenizer.json", "certificate": CERTIFICATE}
        (model / names[damage.split()[0]]).unlink()
    for options in ((), ("--dry-run",)):
        assert message in complaint(2, capsys, model, "--upload", NAME, *options)
    assert not hub.repositories


def test_nothing_is_sent_before_the_proof(
    converted: tuple[Path, Path], hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(shutil.copytree(converted[0], tmp_path / converted[0].name))
    flip(checkpoint / "weights-0-of-1-part-000.safetensors")
    assert command(checkpoint, tmp_path / "out", "--upload", NAME) == 2
    assert "damaged" in capsys.readouterr().err
    assert hub.asked == ["GET /api/whoami-v2"] and not (tmp_path / "out").exists()


def test_who_may_not_write_hears_it_before_the_conversion(
    converted: tuple[Path, Path],
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command_line = (converted[0], tmp_path / "out", "--upload", NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert "does not know the token: run 'hf auth login' again" in complaint(2, capsys, *command_line)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN")
    assert "no token of the hub: run 'hf auth login'" in complaint(2, capsys, *command_line)
    assert not (tmp_path / "out").exists()


def test_without_the_clients_package(
    converted: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    said = complaint(2, capsys, converted[0], tmp_path / "out", "--upload", NAME, "--dry-run")
    assert "the package huggingface_hub is not installed; pip install" in said
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named(
    converted: tuple[Path, Path], hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, model = converted
    for name in ("small", "me/a/b", "me/two--dashes", "me/white space", "/small", "me/", "me/x.git"):
        said = complaint(2, capsys, checkpoint, tmp_path / "out", "--upload", name)
        assert f"--upload {name}: is no OWNER/NAME of a repository: " in said
    assert "OUT is missing" in complaint(2, capsys, checkpoint)
    assert "--private does not go with" in complaint(2, capsys, checkpoint, tmp_path / "out", "--private")
    assert "--dtype does not go with" in complaint(
        2, capsys, model, "--upload", NAME, "--dry-run", "--dtype", "int8"
    )
    for option in ("--check", "--to-checkpoint"):
        said = complaint(2, capsys, checkpoint, tmp_path / "out", option, "--upload", NAME)
        assert f"{option} does not go with --upload" in said
    assert "certificate.json: missing" in complaint(2, capsys, checkpoint, "--upload", NAME)
    assert not (tmp_path / "out").exists() and not hub.repositories


def test_what_the_hub_refuses(
    model: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fails = {"/api/repos/create": 403}
    assert "does not allow it: give a token that may write" in complaint(2, capsys, model, "--upload", NAME)
    hub.fails = {"/commit/": 412}
    said = complaint(1, capsys, model, "--upload", NAME)
    assert said.startswith(
        f"memoryformer: {model}: not sent to {NAME}: {hub.url} answers 412 (as the test asks)"
    )
    hub.fails = {}
    assert list(hub.repositories[NAME]) == [".gitattributes"]
    assert "is there already and public" in complaint(2, capsys, model, "--upload", NAME, "--private")
    assert list(hub.repositories[NAME]) == [".gitattributes"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in complaint(2, capsys, model, "--upload", NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert f"http://127.0.0.1:{port} does not answer" in complaint(1, capsys, model, "--upload", NAME)


def test_the_licence_is_in_the_certificate(converted: tuple[Path, Path]) -> None:
    assert json.loads((converted[1] / CERTIFICATE).read_text())["license"] == "cc-by-4.0"
