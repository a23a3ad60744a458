"""The token stream: batches that are a function of (data config, tokenizer, sizes, step) alone.

Row j of the global batch of step t is sample i = t * G + j. It belongs to logical stream i mod L. Rank r of R
reads the streams s with s mod R == r (`reading_ranks`): no rank touches another's, and with more ranks than streams
some read none. (Which rank trains on a row is another question: `mf_train.training.batches`.) Each logical stream
has, for each source, a cursor of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from mf_train.config import DataConfig
from mf_train.data.documents import Chunk, Source, Tokens
from mf_train.data.sources import open_source
from mf_train.data.stream.order import Mixture, WindowOrder
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError

State = dict[str, Any]

_STATE_VERSION = 2
_CONTENT = ("documents", "bytes", "tokens", "fingerprint")  # of a source's identity
_LEAST_READ = 16384  # tokens that a cursor asks its source for at once


class Position(NamedTuple):
    """Where a stream is in a source: all that its cursor's state is."""

    rows: int = 0  # taken so far
    documents: int = 0  # read to their ends so far
    window: int = 0
    document: int = 0  # which of its window
    start: int = 0  # in the document, as its source counts
    token: int = 0  # after `start`


class Row(NamedTuple):
    """A row of the global batches, and the one position of the state that it changed."""

    stream: int
    source: int
    position: Position
    tokens: Tokens  # [S + 1]


class TokenStream:
    """The rows of every global batch that a rank reads, without end.

    A row has sequence_length + 1 tokens of one source: documents in pseudo-random order, each followed by
    end of text, concatenated and cut; the next row of the same stream and source begins with this row's last
    token, so every token is predicted exactly once. Memory does not depend on the lengths of documents: it is
    bounded by (L / R) * sources * (a chunk of 16,384 tokens or 4 S, one row and the numbers of a window).

    With `workers`, an object gives only the rows of every `workers`-th of the rank's streams. `sources` are those of
    `data.train` if they are open already.
    Raises UserError when there is no training source, or as `open_source` does.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        sequence_length: int,
        global_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        worker: int = 0,
        workers: int = 1,
        sources: list[Source] | None = None,
    ) -> None:
        assert 0 <= data_rank < data_size and 0 <= worker < workers
        if not data.train:
            raise UserError("data.train is empty: name at least one source of training text")
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.data_rank = data_rank
        self.data_size = data_size
        self.tokenizer = tokenizer
        self.sources = sources or [
            open_source(source, f"data.train[{i}]", data, tokenizer) for i, source in enumerate(data.train)
        ]
        self._data = data
        mixture = Mixture([source.weight for source in data.train])
        orders = [self._order(index) for index in range(len(self.sources))]
        self._streams = {
            number: _LogicalStream(self._open_cursors(orders, number), mixture, number)
            for number in range(data_rank, data.logical_streams, data_size)
            if stream_worker(number, data_size, workers) == worker
        }
        self.step = 0
        self._row = 0  # of the rows of this step
        self._rows = self.row_numbers()

    @property
    def num_streams(self) -> int:
        """How many logical streams this object has."""
        return len(self._streams)

    def row_numbers(self, step: int | None = None) -> Sequence[int]:
        """Numbers in the global batch, ascending, of the rows that this rank reads for a step; None: the next one."""
        step = self.step if step is None else step
        ranks = reading_ranks(step, self.global_batch_size, self._data.logical_streams, self.data_size)
        return [row for row, rank in enumerate(ranks) if rank == self.data_rank]

    def next_row(self) -> Row:
        """This object's next row, in the order of samples."""
        tokens = np.empty(self.sequence_length + 1, np.int32)
        number, source = self.fill(tokens)
        return Row(number, source, self.position(number, source), tokens)

    def next_batch(self) -> Tokens:
        """This rank's rows of the next global batch, int32 [rows, S + 1], in the order of `row_numbers`.

        Only of an object that has all of a rank's streams.
        """
        rows = np.empty((len(self._rows), self.sequence_length + 1), np.int32)
        for row in rows:
            self.fill(row)
        self._turn_to(self.step + 1)
        return rows

    def fill(self, tokens: Tokens) -> tuple[int, int]:
        """Write the next row [S + 1] to `tokens`; gives its stream and source, whose `position` it changed.

        Only of an object with a stream.
        """
        while True:
            if self._row == len(self._rows):
                self._turn_to(self.step + 1)
                continue
            sample = self.step * self.global_batch_size + self._rows[self._row]
            self._row += 1
            number = sample % self._data.logical_streams
            stream = self._streams.get(number)
            if stream is not None:
                return number, stream.fill(tokens)

    def position(self, stream: int, source: int) -> Position:
        """Where a stream of this object is in a source."""
        return self._streams[stream].position(source)

    def identity(self) -> State:
        """What the batches depend on, beside the step: a state is only good for an equal one."""
        sources = [
            {
                "name": source.name,
                "weight": config.weight,
                "documents": source.num_documents,
                "bytes": source.num_bytes,
                "tokens": source.num_tokens,
                "fingerprint": source.fingerprint,
            }
            for config, source in zip(self._data.train, self.sources, strict=True)
        ]
        return {
            "version": _STATE_VERSION,
            "data.seed": self._data.seed,
            "data.logical_streams": self._data.logical_streams,
            "data.block_documents": self._data.block_documents,
            "data.window_blocks": self._data.window_blocks,
            "training.global_batch_size": self.global_batch_size,
            "model.sequence_length": self.sequence_length,
            "tokenizer": self.tokenizer.fingerprint,
            "sources": sources,
        }

    def state_dict(self) -> State:
        """State of this rank's streams after the batches given out so far: JSON-able, small numbers only.

        `streams` maps a stream's number (as text) to one `Position` a source.
        """
        return {"step": self.step, "identity": self.identity(), "streams": self.positions()}

    def positions(self) -> dict[str, list[Position]]:
        """The changing part of `state_dict`: each stream's cursors."""
        return {str(number): stream.positions() for number, stream in self._streams.items()}

    def load_state_dict(self, state: State) -> None:
        """Continue from a merged state (or any that has this rank's streams), whatever R it was saved with.

        Raises UserError naming the key or the source when the state is of another stream.
        """
        _check_identity(state["identity"], self.identity())
        missing = [number for number in self._streams if str(number) not in state["streams"]]
        if missing:
            raise UserError(
                f"the saved data state lacks logical stream {missing[0]}: merge the states of all ranks"
            )
        for number, stream in self._streams.items():
            stream.load([Position(*position) for position in state["streams"][str(number)]])
        self._turn_to(state["step"])

    def follow(self, state: State) -> None:
        """Begin after another stream, of which `state` is a merged state.

        Steps and shares of the sources are counted anew. A source whose documents the other one read in the same order
        (the same documents under the same number of `data.train`, `data.seed`, logical streams, blocks and windows)
        goes on at its place, so that none comes again before the others; any other source begins.
        """
        saved, here = state["identity"], self.identity()
        sizes = ("training.global_batch_size", "model.sequence_length", "sources")
        same = all(saved.get(key) == value for key, value in here.items() if key not in sizes)
        pairs = zip_longest(saved["sources"][: len(here["sources"])], here["sources"])
        kept = [same and before is not None and not _changes(before, now, _CONTENT) for before, now in pairs]
        for number, stream in self._streams.items():
            before = state["streams"][str(number)] if same else []
            places = zip_longest(before[: len(kept)], kept)
            stream.load([Position(*place)._replace(rows=0) if keep else Position() for place, keep in places])
        self._turn_to(0)

    def _turn_to(self, step: int) -> None:
        self.step, self._row = step, 0
        self._rows = self.row_numbers()

    def _order(self, source: int) -> WindowOrder:
        return WindowOrder(
            seed=self._data.seed,
            source=source,
            num_documents=self.sources[source].num_documents,
            streams=self._data.logical_streams,
            block_documents=self._data.block_documents,
            window_blocks=self._data.window_blocks,
        )

    def _open_cursors(self, orders: list[WindowOrder], stream: int) -> list[_Cursor]:
        return [_Cursor(*pair, stream) for pair in zip(self.sources, orders, strict=True)]


def reading_ranks(step: int, global_batch_size: int, logical_streams: int, data_size: int) -> list[int]:
    """The data-parallel rank that reads each row of a step's global batch."""
    first = step * global_batch_size
    return [sample % logical_streams % data_size for sample in range(first, first + global_batch_size)]


def stream_worker(stream: int, data_size: int, workers: int) -> int:
    """The worker of its rank that makes a logical stream's rows."""
    return stream // data_size % workers


def merge_states(states: Sequence[State]) -> State:
    """The global state of all ranks' states (in any order): the same for every R.

    Raises ValueError when they are not of one step and one stream, or when a logical stream is missing.
    """
    first = states[0]
    streams: dict[str, list[Position]] = {}
    for state in states:
        if state["step"] != first["step"] or state["identity"] != first["identity"]:
            raise ValueError(
                f"states of steps {first['step']} and {state['step']} or of other data cannot be merged"
            )
        streams.update(state["streams"])
    expected = first["identity"]["data.logical_streams"]
    if len(streams) != expected:
        raise ValueError(f"the ranks' states hold {len(streams)} of {expected} logical streams")
    in_order = {str(number): streams[str(number)] for number in range(expected)}
    return {"step": first["step"], "identity": first["identity"], "streams": in_order}


class _LogicalStream:
    """One of the L streams: a cursor a source, and the counts that choose the next row's source."""

    def __init__(self, cursors: list[_Cursor], mixture: Mixture, number: int) -> None:
        self._cursors = cursors
        self._mixture = mixture
        self._start = mixture.starting_counts(number)
        self._counts = list(self._start)  # of the mixture's elements that came before the next

    def fill(self, out: Tokens) -> int:
        source = self._mixture.next_source(self._counts)
        self._counts[source] += 1
        self._cursors[source].fill(out)
        return source

    def positions(self) -> list[Position]:
        return [self.position(source) for source in range(len(self._cursors))]

    def load(self, positions: list[Position]) -> None:
        rows = [position.rows for position in positions]
        self._counts = [start + count for start, count in zip(self._start, rows, strict=True)]
        for cursor, position in zip(self._cursors, positions, strict=True):
            cursor.load(position)

    def position(self, source: int) -> Position:
        return self._cursors[source].position(self._counts[source] - self._start[source])


@dataclass(slots=True)
class _Held:
    """A chunk that was read, and where in the order it begins."""

    chunk: Chunk
    documents: int  # read to their ends before it
    window: int
    index: int  # in the window, of the chunk's first document


@dataclass(slots=True)
class _Cursor:
    """A place in a source's documents in the order of one stream.

    `_held` are the chunks between the place and what was read last; the place itself is `_token` tokens into the
    first of them, or after the place (`_window`, `_index`, `_start`) to read next when there is none.
    """

    source: Source
    order: WindowOrder
    stream: int
    _held: deque[_Held] = field(default_factory=deque)
    _token: int = 0
    _documents: int = 0
    _window: int = 0
    _index: int = 0
    _start: int = 0
    _window_documents: list[int] | None = None  # of window number _window, once it is needed

    def fill(self, out: Tokens) -> None:
        """Write the next len(out) tokens to `out`; the place moves on by one less."""
        filled, begin, chunk = 0, self._token, 0
        while True:
            if chunk == len(self._held):
                self._read(len(out))
            tokens = self._held[chunk].chunk.tokens
            part = tokens[begin : begin + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            if filled == len(out):
                break
            begin = max(0, begin - len(tokens))
            chunk += 1
        self._token += len(out) - 1
        while self._token >= len(self._held[0].chunk.tokens):
            self._token -= len(self._held.popleft().chunk.tokens)

    def position(self, rows: int) -> Position:
        documents, window, index = self._documents, self._window, self._index
        start, token = self._start, self._token
        if self._held:
            held = self._held[0]
            piece = bisect_right(held.chunk.offsets, token) - 1
            k, start = held.chunk.places[piece]
            token -= held.chunk.offsets[piece]
            documents, window, index = held.documents + k, held.window, held.index + k
        if self.source.starts_are_tokens:  # where a chunk was cut leaves no trace
            start, token = start + token, 0
        return Position(rows, documents, window, index, start, token)

    def load(self, position: Position) -> None:
        self._held.clear()
        if position.window != self._window:
            self._window_documents = None
        _, self._documents, self._window, self._index, self._start, self._token = position

    def _read(self, wanted: int) -> None:
        if self._window_documents is None:
            self._window_documents = self.order.window(self.stream, self._window)
        chunk = self.source.read(
            self._window_documents[self._index :], self._start, max(4 * wanted, _LEAST_READ)
        )
        self._held.append(_Held(chunk, self._documents, self._window, self._index))
        passed, self._start = chunk.end
        self._documents += passed
        self._index += passed
        if self._index == len(self._window_documents):
            self._window, self._index, self._window_documents = self._window + 1, 0, None


def _check_identity(saved: State, here: State) -> None:
    for key, value in here.items():
        if key != "sources" and saved.get(key) != value:
            raise UserError(
                f"{key} was {saved.get(key)} when the data state was saved and is {value} now: "
                "put it back, or start a new run"
            )
    if len(saved["sources"]) != len(here["sources"]):
        raise UserError(
            f"data.train had {len(saved['sources'])} sources when the data state was saved and has "
            f"{len(here['sources'])} now: put them back, make the change in a phase (docs/training.md), or start "
            "a new run"
        )
    for index, (before, now) in enumerate(zip(saved["sources"], here["sources"], strict=True)):
        changed = _changes(before, now, ("weight", *_CONTENT))
        if changed:
            raise UserError(
                f"data.train[{index}] ({now['name']}) is not the source of the saved data state: {changed}; "
                "put it back, make the change in a phase (docs/training.md), or start a new run"
            )


def _changes(before: State, now: State, keys: Iterable[str]) -> str:
    return ", ".join(f"{key} was {before[key]} and is {now[key]}" for key in keys if before[key] != now[key])
