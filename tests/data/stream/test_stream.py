"""The stream's contract: batches are a function of (data config, tokenizer, sizes, step) alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mf_train.config import DataConfig, SourceConfig
from mf_train.data.documents import SEGMENT_BYTES
from mf_train.data.shards.shard import TokenShardWriter
from mf_train.data.stream.digest import batch_digest, format_digest
from mf_train.data.stream.order import EpochOrder
from mf_train.data.stream.stream import State, TokenStream, merge_states
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from tests.data.stream.reference import reference_batches
from tests.data.texts import random_documents, write_json_lines
from tests.processes import start_python

SEQUENCE = 23
BATCH = 8
STREAMS = 16


@pytest.fixture(scope="module")
def texts() -> list[list[str]]:
    """Of three sources; the first has documents longer than many rows and than two segments."""
    long = ["word " * 7000, "a  \n" * 9000, "United States of " * 3000]
    assert all(len(text) > 2 * SEGMENT_BYTES for text in long)
    return [random_documents(40, seed=1) + long, random_documents(7, seed=2), ["only one"]]


@pytest.fixture(scope="module")
def data(texts: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("stream")
    paths = [write_json_lines(folder / f"{i}.jsonl", documents) for i, documents in enumerate(texts)]
    weights = [0.6, 0.3, 0.1]
    sources = tuple(SourceConfig(path=p, weight=w) for p, w in zip(paths, weights, strict=True))
    return DataConfig(train=sources, seed=5, logical_streams=STREAMS)


def make_ranks(data: DataConfig, tokenizer: Tokenizer, ranks: int, batch: int = BATCH) -> list[TokenStream]:
    return [TokenStream(data, tokenizer, SEQUENCE, batch, rank, ranks) for rank in range(ranks)]


def next_global(ranks: list[TokenStream]) -> np.ndarray:
    batch = np.zeros((ranks[0].global_batch_size, SEQUENCE + 1), np.int32)
    for rank in ranks:
        numbers = rank.row_numbers()
        batch[numbers] = rank.next_batch()
    return batch


def merged(ranks: list[TokenStream]) -> State:
    """What a checkpoint would hold: through JSON, the ranks in another order."""
    state: State = json.loads(json.dumps(merge_states([rank.state_dict() for rank in reversed(ranks)])))
    return state


@pytest.mark.parametrize("batch", [7, 8, 16, 24])
def test_batches_are_the_reference_for_every_number_of_ranks(
    batch: int, data: DataConfig, texts: list[list[str]], tokenizer: Tokenizer
) -> None:
    expected = reference_batches(data, texts, tokenizer, SEQUENCE, batch)
    streams = {ranks: make_ranks(data, tokenizer, ranks, batch) for ranks in (1, 2, 3, 5, 8, 17, 31)}
    for _ in range(30):
        wanted = next(expected)
        for ranks in streams.values():
            np.testing.assert_array_equal(next_global(ranks), wanted)


def test_resume_at_any_step_with_any_number_of_ranks(data: DataConfig, tokenizer: Tokenizer) -> None:
    steps = 40
    whole = make_ranks(data, tokenizer, 1)
    digests = [batch_digest(next_global(whole)) for _ in range(steps)]
    assert len(set(digests)) == steps
    random_state = np.random.default_rng(0)
    ranks = make_ranks(data, tokenizer, 2)
    for step in range(steps):
        if random_state.random() < 0.4:  # a restart
            state = merged(ranks)
            assert state["step"] == step and len(json.dumps(state)) < 5000
            ranks = make_ranks(data, tokenizer, int(random_state.choice([1, 2, 3, 5, 8, 20])))
            for rank in ranks:
                rank.load_state_dict(state)
        assert batch_digest(next_global(ranks)) == digests[step]


def test_state_does_not_depend_on_the_ranks_or_restarts(data: DataConfig, tokenizer: Tokenizer) -> None:
    one, five = make_ranks(data, tokenizer, 1), make_ranks(data, tokenizer, 5)
    for _ in range(9):
        next_global(one), next_global(five)
    state = merged(one)
    assert merged(five) == state
    again = make_ranks(data, tokenizer, 3)
    for rank in again:
        rank.load_state_dict(state)
    assert merged(again) == state


def test_positions_count_the_documents_that_have_ended(
    data: DataConfig, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """After every row of texts and of a token shard, whose documents are read many at once."""
    ends = tokenizer.end_of_text_id
    generator = np.random.default_rng(8)
    with TokenShardWriter(tmp_path / "shard", "uint16") as writer:
        for length in generator.integers(0, 3 * SEQUENCE, 600):
            writer.add([*generator.integers(ends + 1, 4000, length), ends])
        writer.finish()
    sources = (*data.train, SourceConfig(path=str(tmp_path / "shard.bin"), weight=1.0))
    stream = make_ranks(replace(data, train=sources), tokenizer, 1)[0]
    ended: Counter[tuple[int, int]] = Counter()
    for _ in range(60):
        for _ in range(BATCH):
            row = stream.next_row()
            ended[row.stream, row.source] += int((row.tokens[:-1] == ends).sum())
            assert row.position.documents == ended[row.stream, row.source]
    assert {source for _, source in ended} == {0, 1, 2, 3} and min(ended[s, 3] for s in range(STREAMS)) > 5


@pytest.mark.parametrize("changes", [(1,), (3, 1), (4, 7, 20, 1)])
def test_an_epoch_reassembles(changes: tuple[int, ...], tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Every document of the first epochs stands exactly once, whole, in what the streams gave out."""
    documents = random_documents(50, seed=9)
    path = write_json_lines(tmp_path / "a.jsonl", documents)
    data = DataConfig(train=(SourceConfig(path=path),), logical_streams=STREAMS, window_blocks=1)
    given_out: dict[int, list[int]] = {stream: [] for stream in range(STREAMS)}
    state, sample = None, 0
    for ranks in [make_ranks(data, tokenizer, count) for count in changes]:
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        for _ in range(320 // len(changes)):
            for row in next_global(ranks):
                tokens = given_out[sample % STREAMS]
                assert not tokens or tokens[-1] == row[0]  # rows overlap by one token
                tokens += row[1:].tolist() if tokens else row.tolist()
                sample += 1
        state = merged(ranks)

    full = [text for text in documents if text]
    source = EpochOrder(seed=0, source=0, size=len(full))
    epochs: list[list[str]] = [[], []]
    for stream, tokens in given_out.items():
        pieces = split_documents(tokens, tokenizer)
        cut = pieces[-1].rstrip("\ufffd")  # the last document, perhaps inside a character
        assert any(text.startswith(cut) for text in full)
        # blocks of one document and windows of one block here: document n of a stream is element stream + 16 n
        for n, piece in enumerate(pieces[:-1]):
            element = stream + n * STREAMS
            assert piece == full[source[element]]
            if element < 2 * len(full):
                epochs[element // len(full)].append(piece)
    assert [sorted(epoch) for epoch in epochs] == [sorted(full)] * 2


def test_a_document_without_spaces(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """It is cut between characters, and comes back whole."""
    document = "é🎉x" * SEGMENT_BYTES
    path = write_json_lines(tmp_path / "a.jsonl", [document])
    stream = TokenStream(DataConfig(train=(SourceConfig(path=path),), logical_streams=1), tokenizer, 5000, 1)
    tokens = stream.next_batch()[0].tolist()
    while tokenizer.end_of_text_id not in tokens:
        state = json.loads(json.dumps(stream.state_dict()))
        stream.load_state_dict(state)
        tokens += stream.next_batch()[0, 1:].tolist()
    assert split_documents(tokens, tokenizer)[0] == document


def split_documents(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    pieces: list[list[int]] = [[]]
    for token in tokens:
        if token == tokenizer.end_of_text_id:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return [tokenizer.decode(piece) for piece in pieces]


def test_mixture_of_a_batch_and_of_the_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    weights = [5.0, 2.0, 1.0]
    sources = []
    for index, weight in enumerate(weights):
        path = write_json_lines(tmp_path / f"{index}.jsonl", [f"{index} " * 100] * 3)
        sources.append(SourceConfig(path=path, weight=weight))
    stream = TokenStream(DataConfig(train=tuple(sources), logical_streams=16), tokenizer, SEQUENCE, 16)
    digits = [tokenizer.encode(f"{index}")[-1] for index in range(3)]
    counts = np.zeros(3, int)
    for _ in range(20):
        batch = stream.next_batch()
        in_batch = np.array([(batch == digit).any(axis=1).sum() for digit in digits])
        assert np.abs(in_batch - 16 * np.array(weights) / 8).max() <= 1
        counts += in_batch
    assert counts.tolist() == [200, 80, 40]


def test_golden_stream(data: DataConfig, tokenizer: Tokenizer) -> None:
    """Changing these changes what every run trains on."""
    assert tokenizer.fingerprint == "1e8bd07e862d91ba"
    stream = TokenStream(data, tokenizer, SEQUENCE, BATCH)
    assert [batch_digest(stream.next_batch()) for _ in range(3)] == GOLDEN_STREAM


RANK = """
import json, sys
from mf_train.config import DataConfig, SourceConfig
from mf_train.data.stream.digest import rows_digest
from mf_train.data.stream.stream import TokenStream
from mf_train.data.tokenizer import Tokenizer
tokenizer, path, rank, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
data = DataConfig(train=(SourceConfig(path=path),), logical_streams=16)
stream = TokenStream(data, Tokenizer(tokenizer), 23, 8, rank, size)
print(json.dumps([rows_digest(stream.row_numbers(), stream.next_batch()) for _ in range(20)]))
"""


def test_processes_that_open_a_source_at_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", random_documents(20_000, seed=4, longest=40))
    ranks = [start_python(RANK, tokenizer.path, path, rank, 4) for rank in range(4)]
    parts = []
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0 and err == "", err  # and no progress bars where nobody looks
        parts.append(json.loads(out))
    data = DataConfig(train=(SourceConfig(path=path),), logical_streams=16)
    stream = TokenStream(data, tokenizer, 23, 8)
    for digests in zip(*parts, strict=True):
        assert format_digest(sum(digests) % 2**64) == batch_digest(stream.next_batch())


def test_each_row_is_read_by_one_rank(data: DataConfig, tokenizer: Tokenizer) -> None:
    """With more ranks than streams some read nothing, and no two have a stream in common."""
    for ranks in (1, 3, 16, 40):
        streams = make_ranks(data, tokenizer, ranks, 24)
        assert sum(stream.num_streams for stream in streams) == STREAMS
        for step in (0, 1, 5):
            rows = [row for stream in streams for row in stream.row_numbers(step)]
            assert sorted(rows) == list(range(24))
    assert streams[-1].num_streams == 0 and streams[-1].next_batch().shape == (0, SEQUENCE + 1)


def test_a_stream_of_no_source_is_refused(data: DataConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"data\.train is empty"):
        TokenStream(replace(data, train=()), tokenizer, SEQUENCE, 8)


def test_sources_without_text_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(UserError, match=r"data.train\[0\]: .*a.jsonl holds no text"):
        TokenStream(DataConfig(train=(SourceConfig(path=path),)), tokenizer, SEQUENCE, 8)


def test_a_state_of_another_stream_is_refused(
    data: DataConfig, texts: list[list[str]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def refused(other: DataConfig, message: str, sequence_length: int = SEQUENCE, batch: int = BATCH) -> None:
        with pytest.raises(UserError, match=message) as caught:
            TokenStream(other, tokenizer, sequence_length, batch).load_state_dict(state)
        assert "\n" not in str(caught.value)

    def with_source(index: int, source: SourceConfig) -> DataConfig:
        return replace(data, train=(*data.train[:index], source, *data.train[index + 1 :]))

    state = merged(make_ranks(data, tokenizer, 1))
    refused(replace(data, seed=6), "data.seed was 5 .* is 6 now")
    refused(replace(data, logical_streams=32), "data.logical_streams was 16 .* is 32 now")
    refused(replace(data, train=data.train[:2]), "data.train had 3 sources .* has 2 now")
    refused(data, "model.sequence_length was 23 .* is 24 now", sequence_length=24)
    refused(data, "training.global_batch_size was 8 .* is 16 now", batch=16)
    heavier = with_source(1, replace(data.train[1], weight=9.0))
    refused(heavier, r"data.train\[1\] .*1.jsonl. is not the source .*: weight was 0.3 and is 9.0")
    fewer = write_json_lines(tmp_path / "fewer.jsonl", texts[0][2:])
    refused(
        with_source(0, replace(data.train[0], path=fewer)),
        r"data.train\[0\] .*: documents was \d+ and is \d+",
    )
    edited = write_json_lines(tmp_path / "edited.jsonl", ["only two"])
    refused(with_source(2, replace(data.train[2], path=edited)), r"data.train\[2\] .*: fingerprint was")
    state["identity"]["tokenizer"] = "another"
    refused(data, "tokenizer was another .* is 1e8bd07e862d91ba now")


def test_moved_data_resumes(
    data: DataConfig, texts: list[list[str]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    before = make_ranks(data, tokenizer, 1)
    next_global(before)
    moved = tuple(
        replace(source, path=write_json_lines(tmp_path / f"{i}.jsonl", texts[i]))
        for i, source in enumerate(data.train)
    )
    after = make_ranks(replace(data, train=moved), tokenizer, 1)
    after[0].load_state_dict(merged(before))
    np.testing.assert_array_equal(next_global(after), next_global(before))


def test_states_that_do_not_belong_together_are_refused(data: DataConfig, tokenizer: Tokenizer) -> None:
    first, second = make_ranks(data, tokenizer, 2)
    with pytest.raises(ValueError, match="8 of 16 logical streams"):
        merge_states([first.state_dict()])
    with pytest.raises(UserError, match="lacks logical stream 1"):
        second.load_state_dict(first.state_dict())
    first.next_batch()
    with pytest.raises(ValueError, match="steps 1 and 0"):
        merge_states([first.state_dict(), second.state_dict()])


GOLDEN_STREAM = ["8e57052ea7a496d0", "f74fa9157f729703", "e54be87c79aa526b"]


def rows_of_source(stream: TokenStream, rows: int, wanted: int = 0) -> dict[int, list[int]]:
    """The tokens that predict others, in the next rows, of one source by logical stream."""
    found: dict[int, list[int]] = {number: [] for number in range(STREAMS)}
    for _ in range(rows):
        row = stream.next_row()
        if row.source == wanted:
            found[row.stream] += row.tokens[:-1].tolist()
    return found


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_stream_that_follows_reads_on(ranks: int, data: DataConfig, tokenizer: Tokenizer) -> None:
    """Other rows, batches, weights and sources: what stays is read on without a gap, and the rest begins."""
    first = make_ranks(data, tokenizer, 1)[0]
    steps, long = 20, 31
    read = rows_of_source(first, steps * BATCH)
    changed = replace(data, train=(replace(data.train[0], weight=0.2), data.train[2]))
    state = make_ranks(data, tokenizer, ranks)
    for stream in state:
        for _ in range(steps):
            stream.next_batch()
    followers = [TokenStream(changed, tokenizer, long, 12, rank, 2) for rank in range(2)]
    for follower in followers:
        follower.next_batch()  # what it has read before does not count
        follower.follow(merged(state))
    on = [rows_of_source(follower, 60) for follower in followers]
    whole = TokenStream(replace(data, train=data.train[:1]), tokenizer, 4000, STREAMS)
    for row in (whole.next_row() for _ in range(STREAMS)):
        tokens = read[row.stream] + on[row.stream % 2][row.stream]
        assert 0 < len(read[row.stream]) < len(tokens) < 4000
        assert tokens == row.tokens[: len(tokens)].tolist()
    # the source that is now under another number, and all of another order, begin
    new = TokenStream(changed, tokenizer, long, 12)
    new.follow(merged(state))
    fresh = TokenStream(changed, tokenizer, long, 12)
    assert rows_of_source(new, 60, 1) == rows_of_source(fresh, 60, 1)
    for other in (replace(data, seed=6), replace(data, logical_streams=STREAMS // 2), data):
        one, two = (TokenStream(other, tokenizer, SEQUENCE, BATCH) for _ in range(2))
        one.follow(merged(state))
        same = all(bool((one.next_batch() == two.next_batch()).all()) for _ in range(5))
        assert same == (other != data)


def test_a_stream_that_followed_resumes(data: DataConfig, tokenizer: Tokenizer) -> None:
    before = make_ranks(data, tokenizer, 1)
    next_global(before)
    follower, again = (TokenStream(data, tokenizer, 31, 12) for _ in range(2))
    follower.follow(merged(before))
    for _ in range(3):
        follower.next_batch()
    again.load_state_dict(merged([follower]))
    assert again.step == 3
    np.testing.assert_array_equal(again.next_batch(), follower.next_batch())
