"""The format is Megatron's own, in both directions; what cannot be written whole is not there at all."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mf_train.data.files.access import OpenFiles
from mf_train.data.shards.shard import TokenShardWriter, open_shard, token_dtype
from mf_train.errors import UserError
from tests.processes import run_python

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")
DOCUMENTS = [[5, 0, 7], [0], [], [1, 2, 3, 4, 100], [], [9, 0]]


@pytest.fixture(scope="session")
def megatron() -> Any:
    """megatron-core's own reader and builder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def write(prefix: Path, documents: list[list[int]], dtype: str) -> Path:
    with TokenShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
        written = writer.finish()
    assert (written.documents, written.tokens) == (len(documents), sum(map(len, documents)))
    return prefix


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_reads_what_we_write(tmp_path: Path, megatron: Any, dtype: str) -> None:
    dataset = megatron.IndexedDataset(str(write(tmp_path / "a", DOCUMENTS, dtype)))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset[0].dtype == dtype
    assert dataset.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint8", "int64"])
def test_the_bytes_are_those_of_megatron(tmp_path: Path, megatron: Any, dtype: str) -> None:
    import torch

    write(tmp_path / "a", DOCUMENTS, dtype)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "b.bin"), dtype=getattr(np, dtype))
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "b.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_the_type_is_the_one_megatron_chooses(megatron: Any) -> None:
    for size in (2, 4096, 65499, 65500, 65536, 250_000):
        assert np.dtype(token_dtype(size)) == megatron.DType.optimal_dtype(size)


def test_pieces_of_documents(tmp_path: Path) -> None:
    """`write` gives the file that `add` gives, with the same hashes."""
    stored = np.concatenate([np.array(document, "<u2") for document in DOCUMENTS])
    ends = np.cumsum([len(document) for document in DOCUMENTS])
    with TokenShardWriter(tmp_path / "pieces", "<u2") as writer:
        for begin in range(0, len(stored), 3):
            inside = ends[(ends > begin) & (ends <= begin + 3)]
            writer.write(stored[begin : begin + 3].tobytes(), inside - begin)
        pieces = writer.finish()
    with TokenShardWriter(tmp_path / "whole", "<u2") as writer:
        for document in DOCUMENTS:
            writer.add(document)
        assert writer.finish() == pieces
    assert (tmp_path / "pieces.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()


def test_boundaries(tmp_path: Path) -> None:
    shard, left = open_shard(str(write(tmp_path / "a", DOCUMENTS, "uint16")), "raise")
    assert shard is not None and left == 0
    assert (shard.num_documents, shard.num_tokens, shard.num_bytes) == (6, 11, 22)
    assert shard.boundaries(OpenFiles(), 0, 6).tolist() == [0, 6, 8, 8, 18, 18, 22]
    assert shard.boundaries(OpenFiles(), 3, 4).tolist() == [8, 18]


def test_an_unfinished_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TokenShardWriter(tmp_path / "a", "uint16") as writer:
        writer.add([1, 2])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with TokenShardWriter(tmp_path / "a", "uint16") as writer:
        for wrong in ([65536], [3, -1]):
            with pytest.raises(ValueError, match="uint16 holds 0 to 65535"):
                writer.add(wrong)
    with TokenShardWriter(tmp_path / "a", "uint16") as writer:
        with pytest.raises(UserError, match="a document of 2147483648 tokens is longer"):
            writer.write(b"", np.array([3, 3 + (1 << 31)]))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a: cannot be written .*Not a directory.: free space"):
        TokenShardWriter(tmp_path / "file" / "a", "uint16")


@pytest.mark.parametrize(("limit", "documents"), [(100_000, 1), (100_000, 60_000)])
def test_a_full_disk_leaves_nothing(tmp_path: Path, limit: int, documents: int) -> None:
    """The system refuses files over `limit` bytes: first the .bin is too large, then only the index."""
    code = """
import resource, signal, sys
from mf_train.data.shards.shard import TokenShardWriter
from mf_train.errors import UserError
prefix, limit, documents = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with TokenShardWriter(prefix, "uint8" if documents > 1 else "uint16") as writer:
        for _ in range(documents):
            writer.add([1] * (60_000 // documents))
        writer.finish()
except UserError as error:
    print(error)
"""
    said = run_python(code, tmp_path / "a", limit, documents)
    assert f"{tmp_path / 'a'}: cannot be written (File too large)" in said
    assert list(tmp_path.iterdir()) == []
