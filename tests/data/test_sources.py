"""What a configuration calls a source is opened as what it is, or refused by its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from mf_train.config import DataConfig, SourceConfig
from mf_train.data.documents import TextSource
from mf_train.data.sources import open_source, open_text
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from tests.data.texts import json_lines, write_json_lines


def test_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", ["one", "", "two"])
    data = DataConfig(cache=str(tmp_path / "cache"))
    source = open_source(SourceConfig(path=path), "data.train[0]", data, tokenizer)
    assert isinstance(source, TextSource)
    assert (source.name, source.num_files, source.num_documents, source.num_bytes) == (path, 1, 2, 6)
    assert open_text(SourceConfig(path=path), "k", data).text(1) == b"two"
    assert list((tmp_path / "cache" / "text").glob("*.text"))  # data.cache is where it is kept


def test_mistakes_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n" + json_lines([""]))
    (tmp_path / "bad.jsonl").write_bytes(json_lines(["a"]) + b"{oops\n")
    (tmp_path / "a.bin").write_bytes(b"")
    for name, message in [
        ("empty.jsonl", r"data.train\[0\]: .*empty.jsonl holds no text: remove the source or fill it"),
        ("bad.jsonl", r"bad.jsonl: line 2 is not JSON"),
        ("a.jsonl", r"data.train\[0\]: .*a.jsonl does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(SourceConfig(path=str(tmp_path / name)), "data.train[0]", DataConfig(), tokenizer)
    with pytest.raises(UserError, match=r"data.train\[0\]: .*a.bin holds token shards"):
        open_text(SourceConfig(path=str(tmp_path / "a.bin")), "data.train[0]", DataConfig())
