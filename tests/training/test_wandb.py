"""Weights & Biases: what is missing is said before a run starts, and an offline run holds the losses."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from mf_train.config.loading import parse_config
from mf_train.training import wandb_run
from mf_train.training.wandb_run import check_wandb
from tests.training.runs import complaints, read_metrics, small_config, train, write_text

installed = find_spec("wandb") is not None


@pytest.mark.skipif(installed, reason="wandb is installed")
def test_a_missing_package_is_said_at_the_start(tmp_path: Path) -> None:
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    (line,) = complaints(train(tree, "logging.wandb.project=trial", expect=2))
    assert line.endswith("the package wandb is not installed: pip install wandb, or leave it out")
    assert not (tmp_path / "run").exists()


def test_where_a_key_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not wandb_run._has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password 0\n")
    assert wandb_run._has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example:8080")
    assert not wandb_run._has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0")
    assert wandb_run._has_key()


def records(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format: blocks of 32 KiB with pieces (checksum, length, whole, first, middle or last)."""
    place, held = 7, b""  # behind the file's own head
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield held
            held = b""


@pytest.mark.skipif(not installed, reason="wandb is not installed")
def test_an_offline_run_holds_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    wandb = {"project": "trial", "mode": "offline"}
    tree["logging"]["wandb"] = wandb
    check_wandb(parse_config(tree, "here"))
    tree["checkpoint"] = {"interval": 2}
    train(tree, "training.steps=4")
    train(tree, "training.steps=5")
    losses: dict[int, float] = {}
    for path in sorted((tmp_path / "run/wandb").rglob("*.wandb")):
        for data in records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            if items:
                assert int(items["_step"]) not in losses
                losses[int(items["_step"])] = json.loads(items["loss"])
    assert losses == {one["step"]: one["loss"] for one in read_metrics(tmp_path / "run")}
