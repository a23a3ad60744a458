"""A dataset of the hub is documents as files are."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mf_train.config import SourceConfig
from mf_train.data.files.input_files import find_files
from mf_train.data.text.hub import HubDocuments, open_hub
from mf_train.data.text.store import open_documents
from mf_train.errors import UserError
from tests.data.texts import random_documents
from tests.processes import run_python

TEXTS = ["2024-01-01 12:00:00", "", "é🎉\n\tz\u2028 \u2581", "17", "null"]


def open_folder(folder: Path, **settings: str) -> HubDocuments:
    """A dataset folder stands for the hub: load_dataset resolves its name, splits and columns the same way."""
    return open_hub(SourceConfig(hub=str(folder), **settings), "raise", "data.train[1]")  # type: ignore[arg-type]


def texts_of(documents: HubDocuments) -> list[str]:
    return [documents.text(i).decode() for i in range(len(documents))]


def test_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": TEXTS, "n": range(5)}), tmp_path / "data" / "train.parquet")
    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2]}), tmp_path / "data" / "test.parquet")
    documents = open_folder(tmp_path)
    assert texts_of(documents) == [text for text in TEXTS if text]
    assert (documents.files, documents.name, documents.skipped) == (0, str(tmp_path), {})
    cases: list[tuple[dict[str, str], str]] = [
        ({"split": "dev"}, "data.train.1..hub: .*split dev. cannot be loaded: .*Unknown split"),
        ({"split": "test"}, "data.train.1..hub: .*: 1 rows have no 'text'"),
        (
            {"text_field": "body"},
            "has no column 'body' .it has 'text', 'n'.: set data.train.1..text_field",
        ),
        ({"text_field": "n"}, "column 'n' is int64, not text: set data.train.1..text_field"),
    ]
    for settings, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            open_folder(tmp_path, **settings)
        assert "\n" not in str(caught.value)


def test_rows_without_text_are_left_out_on_request(tmp_path: Path) -> None:
    texts = ["a", None, "", None, "é"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "train.parquet")
    documents = open_hub(SourceConfig(hub=str(tmp_path)), "skip", "k")
    assert texts_of(documents) == ["a", "é"] and documents.skipped == {str(tmp_path): 2}
    again = pickle.loads(pickle.dumps(documents))  # as a worker process gets them
    assert texts_of(again) == ["a", "é"] and again.fingerprint == documents.fingerprint


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    """It is refused, or left out and counted as rows without a text are, in a worker process, too."""
    texts = [b"a", b"\xff", None, b"", b"b\xc3", "é".encode(), *[b"x"] * 2000, b"\xed\xa0\x80", b"last"]
    pq.write_table(pa.table({"text": pa.array(texts).view(pa.string())}), tmp_path / "train.parquet")
    source = SourceConfig(hub=str(tmp_path))
    documents = open_hub(source, "skip", "k")
    assert texts_of(documents) == ["a", "é", *["x"] * 2000, "last"]
    assert documents.skipped == {str(tmp_path): 4} and documents.num_bytes == 2007
    again = pickle.loads(pickle.dumps(documents))
    assert texts_of(again) == texts_of(documents) and again.skipped == documents.skipped
    with pytest.raises(UserError, match="1 rows have no 'text'"):
        open_folder(tmp_path)
    del texts[2]
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table({"text": pa.array(texts).view(pa.string())}), tmp_path / "b" / "train.parquet")
    message = (
        r"data.train\[1\].hub: .*: row 1 \(counted from 0\): 'text' is not valid UTF-8: convert it, or set"
    )
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path / "b")


def test_it_is_what_the_text_store_is(tmp_path: Path) -> None:
    """The same documents, lengths, pieces and fingerprint, across Arrow arrays with empty rows anywhere."""
    texts = ["", "", *random_documents(700, 3, 30), ""]
    chunks = [pa.array(texts[:3]), pa.array([""]), pa.array([], pa.string()), pa.array(["x", *texts[3:]])[1:]]
    hub = HubDocuments("hub", chunks)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    store = open_documents(find_files(str(tmp_path / "a.parquet"), "k"), "text", "raise", tmp_path, "s", "k")
    assert texts_of(hub) == [text for text in texts if text]
    assert (len(hub), hub.num_bytes, hub.fingerprint) == (len(store), store.num_bytes, store.fingerprint)
    for i in range(len(hub)):
        assert hub.length(i) == store.length(i) and hub.text(i, 5, 9) == store.text(i, 5, 9)
    for outside in (-1, len(hub)):
        with pytest.raises(IndexError, match=f"has {len(hub)} documents"):
            hub.text(outside)
    assert len(HubDocuments("empty", [])) == 0


def test_an_unreachable_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
from mf_train.config import SourceConfig
from mf_train.data.text.hub import open_hub
from mf_train.errors import UserError
try:
    open_hub(SourceConfig(hub="nobody/nothing-here"), "raise", "data.train[1]")
except UserError as error:
    print(error)
"""
    with monkeypatch.context() as offline:
        offline.setenv("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
        said = run_python(code)
    assert re.fullmatch(r"data.train\[1\].hub: nobody/nothing-here .* cannot be loaded: .*\n", said)
