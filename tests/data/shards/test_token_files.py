"""Token shards as a source: every document whole, in any order; every damage named with its file."""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mf_train.data.shards.shard import TokenShardWriter
from mf_train.data.shards.token_files import MANIFEST_FORMAT, TokenFiles, open_token_files
from mf_train.errors import UserError
from tests.data.shards.test_shard import megatron  # noqa: F401 (a fixture)
from tests.processes import run_python

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")
END, VOCABULARY = 0, 120
Documents = list[list[int]]


def random_tokens(count: int, seed: int, longest: int = 80) -> Documents:
    """Documents of 0 to `longest` ids; about half end with end of text, which some have inside as well."""
    random_state = random.Random(seed)
    documents = []
    for _ in range(count):
        ids = random_state.choices(range(VOCABULARY), k=random_state.randint(0, longest))
        documents.append([*ids, END] if random_state.random() < 0.5 else ids)
    return documents


def write_shards(folder: Path, documents: Documents, shards: int = 1, dtype: str = "uint16") -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(shards):
        with TokenShardWriter(folder / f"{number:03}", dtype) as writer:
            for document in documents[
                number * len(documents) // shards : (number + 1) * len(documents) // shards
            ]:
                writer.add(document)
            writer.finish()
        paths.append(folder / f"{number:03}.bin")
    return paths


def open_paths(paths: list[Path], **settings: Any) -> TokenFiles:
    arguments = {
        "end_of_text_id": END,
        "vocab_size": VOCABULARY,
        "on_error": "raise",
        "name": "shards/*.bin",
        "key": "data.train[0]",
        "tokenizer_fingerprint": "0123",
    }
    return open_token_files(paths, **{**arguments, **settings})


def ended(document: list[int]) -> list[int]:
    return document if document and document[-1] == END else [*document, END]


def joined(documents: Documents) -> list[int]:
    return [token for document in documents for token in ended(document)]


def reassemble(source: TokenFiles, order: list[int], random_state: random.Random) -> Documents:
    """The documents of `order`, read in calls that want a random number of tokens."""
    found: Documents = [[] for _ in order]
    index = start = 0
    while index < len(order):
        wanted = random_state.choice([1, 2, 50, 300, 5000])
        chunk = source.read(order[index:], start, wanted)
        assert chunk.tokens.dtype == np.int32
        assert chunk.offsets[0] == 0 and chunk.offsets[-1] == len(chunk.tokens)
        assert 1 <= len(chunk.places) == len(chunk.offsets) - 1
        assert len(chunk.tokens) <= wanted + len(chunk.places)
        assert chunk.places[0] == (0, start)
        for (piece, at), a, b in zip(chunk.places, chunk.offsets, chunk.offsets[1:], strict=False):
            document = found[index + piece]
            assert len(document) == at and b > a
            document += chunk.tokens[a:b].tolist()
        index, start = index + chunk.end[0], chunk.end[1]
    return found


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64"])
def test_every_document_is_read_whole_in_any_order(tmp_path: Path, dtype: str) -> None:
    documents = random_tokens(500, seed=1)
    source = open_paths(write_shards(tmp_path, documents, shards=7, dtype=dtype))
    assert (source.num_documents, source.num_files, source.skipped) == (500, 7, {})
    assert source.num_stored_tokens == sum(map(len, documents))
    assert source.num_tokens is None and source.num_bytes is None
    random_state = random.Random(2)
    for _ in range(40):
        order = random_state.choices(range(500), k=random_state.randint(1, 90))
        assert reassemble(source, order, random_state) == [ended(documents[i]) for i in order]
    assert reassemble(source, list(range(500)), random_state) == [ended(document) for document in documents]


@pytest.mark.parametrize("stored", [True, False])
def test_documents_that_all_end_the_same_way(tmp_path: Path, stored: bool) -> None:
    documents = [[7] * (i % 5) + ([END] if stored else [7]) for i in range(100)]
    source = open_paths(write_shards(tmp_path, documents))
    chunk = source.read(range(100), 0, 10_000)
    assert chunk.tokens.tolist() == joined(documents)
    assert chunk.end == (100, 0)


def test_an_end_of_text_that_the_type_cannot_hold_is_added(tmp_path: Path) -> None:
    source = open_paths(write_shards(tmp_path, [[1, 2], [], [3]]), end_of_text_id=100_000, vocab_size=100_001)
    assert source.read([2, 1, 0], 0, 99).tokens.tolist() == [3, 100_000, 100_000, 1, 2, 100_000]


def test_the_split_and_the_type_do_not_matter(tmp_path: Path) -> None:
    documents = random_tokens(300, seed=3)
    one = open_paths(write_shards(tmp_path / "one", documents))
    many = open_paths(write_shards(tmp_path / "many", documents, shards=150, dtype="int32"))
    order = random.Random(4).sample(range(300), 300)
    for source in (one, many):
        assert source.read(order, 0, 10**6).tokens.tolist() == joined([documents[i] for i in order])
    assert one.fingerprint == many.fingerprint
    other = [*documents[:-1], [*documents[-1][:-1], 1]]
    assert open_paths(write_shards(tmp_path / "other", other)).fingerprint != one.fingerprint
    moved = [documents[-1], *documents[:-1]]
    assert open_paths(write_shards(tmp_path / "moved", moved)).fingerprint != one.fingerprint


def test_names_may_be_of_either_file(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [[1], [2], [3]], shards=3)
    both = [path.with_suffix(suffix) for path in reversed(paths) for suffix in (".idx", ".bin")]
    assert open_paths(both).read(range(3), 0, 9).tokens.tolist() == [3, END, 2, END, 1, END]


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "uint16"])
def test_what_megatron_writes(tmp_path: Path, megatron: Any, dtype: str) -> None:  # noqa: F811
    """Documents of several sequences, of empty ones and of none."""
    import torch

    random_state = random.Random(5)
    documents = random_tokens(200, seed=6, longest=30)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=getattr(np, dtype))
    for document in documents:
        begin = 0
        while begin < len(document):
            end = random_state.randint(begin, len(document))
            builder.add_item(torch.tensor(document[begin:end]))
            begin = end
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    source = open_paths([tmp_path / "a.bin"])
    order = random_state.choices(range(200), k=150)
    assert reassemble(source, order, random_state) == [ended(documents[i]) for i in order]


def test_without_marks_each_sequence_is_a_document(tmp_path: Path, megatron: Any) -> None:  # noqa: F811
    """As early mergers of GPT-NeoX' files left them."""
    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for document in ([5, 6], [], [7]):
        builder.add_item(torch.tensor(document))
    builder.finalize(str(tmp_path / "a.idx"))
    source = open_paths([tmp_path / "a.bin"])
    assert source.read(range(3), 0, 9).tokens.tolist() == [5, 6, END, END, 7, END]


def test_documents_without_any_sequence(tmp_path: Path, megatron: Any) -> None:  # noqa: F811
    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for _ in range(100):
        builder.end_document()
    builder.add_document(torch.tensor([5]), [1])
    for _ in range(100):
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    source = open_paths([tmp_path / "a.bin"])
    assert source.read(range(201), 0, 9).tokens.tolist() == [*[END] * 100, 5, *[END] * 101]


def test_a_document_of_very_many_sequences(tmp_path: Path, megatron: Any) -> None:  # noqa: F811
    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    builder.add_document(torch.arange(100_000) % 100 + 1, [1] * 100_000)
    builder.add_document(torch.tensor([5, 6]), [1, 1])
    builder.finalize(str(tmp_path / "a.idx"))
    source = open_paths([tmp_path / "a.bin"])
    tokens = source.read([1, 0], 0, 10**6).tokens
    assert tokens[:3].tolist() == [5, 6, END]
    assert np.array_equal(tokens[3:-1], np.arange(100_000) % 100 + 1)


def edit(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


# 60 documents of 3 tokens, uint16: the index has 60 lengths from 34, 60 places from 274 and 61 marks from 754
DAMAGES: dict[str, tuple[Any, str]] = {
    "no index": (lambda bin, idx: idx.unlink(), r"001\.idx is missing: .*001\.bin needs it"),
    "no tokens": (lambda bin, idx: bin.unlink(), r"001\.bin is missing: .*001\.idx needs it"),
    "cut tokens": (
        lambda bin, idx: os.truncate(bin, 200),
        r"001\.bin: is 200 bytes, but its index .*001\.idx describes 360: cut short",
    ),
    "longer tokens": (
        lambda bin, idx: os.truncate(bin, 362),
        r"001\.bin: is 362 bytes, but its index .* describes 360",
    ),
    "cut index": (lambda bin, idx: os.truncate(idx, 1000), r"001\.idx: is 1000 bytes, but .* 1242: cut"),
    "cut header": (lambda bin, idx: os.truncate(idx, 20), r"001\.idx: is 20 bytes, less than the header"),
    "other magic": (lambda bin, idx: edit(idx, 0, b"TNTIDX\0\0\0"), r"001\.idx: not an index of Megatron"),
    "version 2": (lambda bin, idx: edit(idx, 9, b"\2"), r"001\.idx: not an index of Megatron"),
    "floats": (lambda bin, idx: edit(idx, 17, b"\6"), r"001\.idx: its tokens have type code 6"),
    "last mark": (
        lambda bin, idx: edit(idx, 1234, struct.pack("<q", 59)),
        r"001\.idx: damaged: its documents end at sequence 59 of 60",
    ),
    "last length": (lambda bin, idx: edit(idx, 270, struct.pack("<i", -3)), r"001\.idx: damaged: its last"),
    "id too large": (
        lambda bin, idx: edit(bin, 8, struct.pack("<H", VOCABULARY)),
        r"001\.bin: document 1 has id 120 at token 1, but the vocabulary has 120 ids",
    ),
    "marks out of order": (
        lambda bin, idx: edit(idx, 762, struct.pack("<q", 9)),
        r"001\.idx: damaged: .*marks",
    ),
    "negative mark": (lambda bin, idx: edit(idx, 754, struct.pack("<q", -1)), r"001\.idx: damaged: .*marks"),
    "places out of order": (
        lambda bin, idx: edit(idx, 290, struct.pack("<q", 300)),
        r"001\.idx: damaged: .*places out of order",
    ),
    "places beyond the file": (lambda bin, idx: edit(idx, 274, struct.pack("<q", 500)), r"001\.idx: damaged"),
    "places inside a token": (
        lambda bin, idx: edit(idx, 282, struct.pack("<q", 7)),
        r"001\.idx: damaged: .* lengths that do not fit",
    ),
    "lengths of others": (
        lambda bin, idx: edit(idx, 34, struct.pack("<ii", 2, 4)),
        r"001\.idx: .*lengths that",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    paths = write_shards(tmp_path, [[1, 2, 3]] * 120, shards=2)
    damage, message = DAMAGES[case]
    damage(paths[1], paths[1].with_suffix(".idx"))
    with pytest.raises(UserError, match=message) as caught:
        open_paths([*paths[:1], tmp_path / "001.bin"]).read(range(120), 0, 1000)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_negative_ids_and_other_places_are_named(tmp_path: Path) -> None:
    source = open_paths(write_shards(tmp_path, [[1, 2, 3, 4], [5, 6, -7, 8]], dtype="int32"))
    with pytest.raises(UserError, match=r"000\.bin: document 1 has id -7 at token 2, but the vocabulary"):
        source.read([1, 0], 1, 100)
    with pytest.raises(UserError, match=r"document 0 of shards/\*\.bin has fewer than 5 tokens"):
        source.read([0], 5, 100)
    for document in (2, -1, 64, 10**9):
        with pytest.raises(IndexError):
            source.read([document], 0, 100)


def test_types_are_not_mixed(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "a", [[1]]) + write_shards(tmp_path / "b", [[1]], dtype="int32")
    with pytest.raises(
        UserError, match=r"data.train\[0\]: .*a/000.bin holds uint16 and .*b/000.bin int32: make"
    ):
        open_paths(paths)


def test_no_documents_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.train\[0\]: shards/\*\.bin holds no documents: remove the source"
    ):
        open_paths(write_shards(tmp_path, []))


SKIPPED: dict[str, tuple[Any, int]] = {  # how many of the 60 documents of 6 bytes are left out
    "no index": (lambda bin, idx: idx.unlink(), 1),
    "no tokens": (lambda bin, idx: bin.unlink(), 1),
    "cut tokens": (lambda bin, idx: os.truncate(bin, 200), 27),
    "cut between documents": (lambda bin, idx: os.truncate(bin, 198), 27),
    "all tokens lost": (lambda bin, idx: os.truncate(bin, 0), 60),
    "longer tokens": (lambda bin, idx: os.truncate(bin, 362), 0),
    "cut index": (lambda bin, idx: os.truncate(idx, 1000), 1),
    "other magic": (lambda bin, idx: edit(idx, 0, b"TNTIDX\0\0\0"), 1),
    "last mark": (lambda bin, idx: edit(idx, 1234, struct.pack("<q", 59)), 60),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_what_is_not_whole_can_be_left_out(tmp_path: Path, case: str) -> None:
    documents = [[i + 1, 2, 3] for i in range(60)]
    paths = write_shards(tmp_path / "a", documents * 3, shards=3)
    damage, left_out = SKIPPED[case]
    damage(paths[1], paths[1].with_suffix(".idx"))
    source = open_paths(paths, on_error="skip")
    assert source.skipped == ({str(paths[1]): left_out} if left_out else {})
    whole = 60 - left_out if (tmp_path / "a" / "001.bin").exists() and left_out != 1 else 0
    rest = documents + documents[:whole] + documents
    assert source.num_documents == len(rest) and source.num_stored_tokens == 3 * len(rest)
    assert reassemble(source, list(range(len(rest))), random.Random(0)) == [[*d, END] for d in rest]


def test_when_all_is_left_out_there_are_no_documents(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [[1, 2, 3]] * 60)
    os.truncate(paths[0], 5)
    with pytest.raises(UserError, match=r"shards/\*\.bin holds no documents \(60 were left out\): remove"):
        open_paths(paths, on_error="skip")


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """Not a signal, as from a memory map."""
    paths = write_shards(tmp_path, [[1, 2, 3]] * 1000)
    source = open_paths(paths)
    source.read([0, 999], 0, 100)
    os.truncate(paths[0], 3000)
    with pytest.raises(UserError, match=r"000\.bin ended early"):
        source.read([0, 999], 0, 100)
    assert source.read([0], 0, 100).tokens.tolist() == [1, 2, 3, END]
    os.truncate(paths[0].with_suffix(".idx"), 100)
    with pytest.raises(UserError, match=r"000\.idx ended early"):
        source.read([200], 0, 100)


def test_more_shards_than_descriptors(tmp_path: Path) -> None:
    documents = [[i % 100 + 1] for i in range(600)]
    write_shards(tmp_path, documents, shards=300)
    code = """
import resource, sys
from pathlib import Path
from mf_train.data.shards.token_files import open_token_files
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
paths = sorted(Path(sys.argv[1]).glob("*.bin"))
source = open_token_files(paths, 0, 120, "raise", "name", "key", "")
for _ in range(2):
    print(*source.read(range(599, -1, -1), 0, 10000).tokens[::2].tolist())
"""
    expected = " ".join(str(document[0]) for document in reversed(documents))
    assert run_python(code, tmp_path).splitlines() == [expected, expected]


def test_opening_reads_no_index_whole(tmp_path: Path) -> None:
    """10^8 documents in one index of 1.2 GB (all of them empty, so that the file system stores none of it)."""
    count = 10**8
    (tmp_path / "a.bin").touch()
    with (tmp_path / "a.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, 1))
        file.truncate(34 + 12 * count + 8)
    tracemalloc.start()
    source = open_paths([tmp_path / "a.bin"])
    assert source.num_documents == count
    assert source.read([0, count - 1, count // 2], 0, 100).tokens.tolist() == [END] * 3
    assert len(source.fingerprint) == 16
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_long_document_is_read_in_bounded_memory(tmp_path: Path) -> None:
    with TokenShardWriter(tmp_path / "a", "uint16") as writer:
        for part in range(20):
            ends = np.array([10**6] if part == 19 else [])
            writer.write(np.full(10**6, part + 1, np.uint16).tobytes(), ends)
        writer.finish()
    source = open_paths([tmp_path / "a.bin"])
    tracemalloc.start()
    start = total = 0
    while True:
        chunk = source.read([0], start, 10_000)
        total += int(chunk.tokens.sum())
        if chunk.end == (1, 0):
            break
        start = chunk.end[1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 10**6 * 210 and peak < 1 << 20


def manifest(folder: Path, **changes: Any) -> None:
    shard = {"name": "000", "documents": 3, "tokens": 6, "text_bytes": 30}
    content = {"format": MANIFEST_FORMAT, "complete": True, "tokenizer": "0123", "shards": [shard], **changes}
    (folder / "manifest.json").write_text(json.dumps(content))


def test_a_manifest_gives_the_counts(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [[1, END]] * 3)
    manifest(tmp_path)
    source = open_paths(paths)
    assert (source.num_tokens, source.num_bytes) == (6, 30)
    os.truncate(paths[0], 10)
    source = open_paths(paths, on_error="skip")
    assert (source.num_tokens, source.num_bytes) == (None, None)


def test_a_manifest_of_others_is_left_alone(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [[1, END]] * 3)
    for content in ("{", "[]", '{"format": 3}', ""):
        (tmp_path / "manifest.json").write_text(content)
        assert open_paths(paths).num_tokens is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "4567"}, "were made with tokenizer 4567, but tokenizer.path is 0123: set it"),
        ({"complete": False}, "tokenising was not finished: run 'memoryformer data tokenize' again"),
        (
            {"shards": [{"name": "000", "documents": 4, "tokens": 6, "text_bytes": 30}]},
            "000.bin: has 3 documents and 6 tokens, but manifest.json beside it says 4 and 6",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    paths = write_shards(tmp_path, [[1, END]] * 3)
    manifest(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        open_paths(paths)
