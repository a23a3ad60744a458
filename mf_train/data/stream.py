"""The token stream: batches that are a function of (data config, tokenizer, sizes, step) alone (SPEC 5).

Row j of the global batch of step t is sample i = t * G + j. It belongs to logical stream i mod L. Rank r of R
owns the rows with j mod R == r, and so, because R divides G and L, the streams s with s mod R == r: no rank
touches another's. Each logical stream has, for each source, a cursor of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mf_train.config import DataConfig
from mf_train.data.mixture import Mixture
from mf_train.data.order import DocumentOrder
from mf_train.data.segments import segment_end
from mf_train.data.sources import Documents, open_source
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError

Tokens = npt.NDArray[np.int32]
State = dict[str, Any]

_STATE_VERSION = 1


class TokenStream:
    """A rank's rows of every global batch, without end.

    A row has sequence_length + 1 tokens of one source: documents in pseudo-random order, each followed by
    end of text, concatenated and cut; the next row of the same stream and source begins with this row's last
    token, so every token is predicted exactly once. Empty documents are skipped. Documents are tokenised
    when they are reached, in segments: memory is bounded by (L / R) * sources * (one segment + one row).

    Raises UserError when `data_size` does not divide the batch or `data.logical_streams`, when there is no
    training source, or as `open_source` does.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        sequence_length: int,
        global_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
    ) -> None:
        assert 0 <= data_rank < data_size
        _check_sizes(data.logical_streams, global_batch_size, data_size)
        if not data.train:
            raise UserError("data.train is empty: name at least one source of training text")
        self.step = 0
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.row_numbers = range(data_rank, global_batch_size, data_size)
        self.sources = [open_source(source, f"data.train[{i}]") for i, source in enumerate(data.train)]
        for index, documents in enumerate(self.sources):
            if not documents.num_bytes:
                raise UserError(
                    f"data.train[{index}]: all documents of {documents.name} are empty: remove the source"
                )
        self._data = data
        self._tokenizer = tokenizer
        mixture = Mixture([source.weight for source in data.train])
        self._streams = {
            number: _LogicalStream(self._open_cursors(number), mixture, number)
            for number in range(data_rank, data.logical_streams, data_size)
        }

    def next_batch(self) -> Tokens:
        """This rank's rows of the next global batch, int32 [G / R, S + 1], in the order of `row_numbers`."""
        first = self.step * self.global_batch_size
        rows = [
            self._streams[(first + row) % self._data.logical_streams].next_row(self.sequence_length)
            for row in self.row_numbers
        ]
        self.step += 1
        return np.stack(rows)

    def identity(self) -> State:
        """What the batches depend on, beside the step: a state is only good for an equal one."""
        sources = [
            {
                "name": documents.name,
                "weight": source.weight,
                "documents": len(documents),
                "bytes": documents.num_bytes,
                "fingerprint": documents.fingerprint,
            }
            for source, documents in zip(self._data.train, self.sources, strict=True)
        ]
        return {
            "version": _STATE_VERSION,
            "data.seed": self._data.seed,
            "data.logical_streams": self._data.logical_streams,
            "training.global_batch_size": self.global_batch_size,
            "model.sequence_length": self.sequence_length,
            "tokenizer": self._tokenizer.fingerprint,
            "sources": sources,
        }

    def state_dict(self) -> State:
        """State of this rank's streams after the batches given out so far: JSON-able, small numbers only.

        `streams` maps a stream's number (as text) to, per source, [rows taken, document, byte, token].
        """
        return {"step": self.step, "identity": self.identity(), "streams": self.positions()}

    def positions(self) -> dict[str, list[list[int]]]:
        """The changing part of `state_dict`: each stream's cursors."""
        return {str(number): stream.position() for number, stream in self._streams.items()}

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
            stream.load_position(state["streams"][str(number)])
        self.step = state["step"]

    def _open_cursors(self, stream: int) -> list[_Cursor]:
        return [
            _Cursor(
                documents=documents,
                order=DocumentOrder(seed=self._data.seed, source=index, num_documents=len(documents)),
                tokenizer=self._tokenizer,
                first=stream,
                stride=self._data.logical_streams,
            )
            for index, documents in enumerate(self.sources)
        ]


def merge_states(states: Sequence[State]) -> State:
    """The global state of all ranks' states (in any order): the same for every R.

    Raises ValueError when they are not of one step and one stream, or when a logical stream is missing.
    """
    first = states[0]
    streams: dict[str, list[list[int]]] = {}
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
        self._rows = [0] * len(cursors)

    def next_row(self, sequence_length: int) -> Tokens:
        counts = [start + rows for start, rows in zip(self._start, self._rows, strict=True)]
        source = self._mixture.next_source(counts)
        self._rows[source] += 1
        return self._cursors[source].next_row(sequence_length)

    def position(self) -> list[list[int]]:
        return [[rows, *cursor.position()] for rows, cursor in zip(self._rows, self._cursors, strict=True)]

    def load_position(self, position: list[list[int]]) -> None:
        self._rows = [rows for rows, *_ in position]
        for cursor, (_, document, byte, token) in zip(self._cursors, position, strict=True):
            cursor.load_position(document, byte, token)


@dataclass
class _Segment:
    document: int  # how many documents the cursor had passed
    byte: int  # where the segment begins in it
    tokens: Tokens


@dataclass
class _Cursor:
    """A place in the documents first, first + stride, first + 2 * stride, ... of a source's infinite order.

    `_segments` holds the tokens between the place and what was tokenised last; the place itself is
    `_offset` tokens into the first of them, or into the segment at (`_document`, `_byte`) when it is empty.
    """

    documents: Documents
    order: DocumentOrder
    tokenizer: Tokenizer
    first: int
    stride: int
    _segments: deque[_Segment] = field(default_factory=deque)
    _offset: int = 0
    _document: int = 0  # of the next segment to tokenise
    _byte: int = 0

    def next_row(self, sequence_length: int) -> Tokens:
        """The next sequence_length + 1 tokens; the place moves on by sequence_length."""
        held = sum(len(segment.tokens) for segment in self._segments) - self._offset
        while held < sequence_length + 1:
            held += len(self._read_segment())
        held_tokens = np.concatenate([segment.tokens for segment in self._segments])
        row = held_tokens[self._offset : self._offset + sequence_length + 1]
        self._offset += sequence_length
        while self._offset >= len(self._segments[0].tokens):
            self._offset -= len(self._segments.popleft().tokens)
        return row

    def position(self) -> tuple[int, int, int]:
        if self._segments:
            return self._segments[0].document, self._segments[0].byte, self._offset
        return self._document, self._byte, self._offset

    def load_position(self, document: int, byte: int, token: int) -> None:
        self._segments.clear()
        self._document, self._byte, self._offset = document, byte, token

    def _read_segment(self) -> Tokens:
        """Tokenise the next segment and hold it; the last one of a document ends with end of text."""
        utf8 = self.documents.utf8(self.order[self.first + self._document * self.stride])
        while not len(utf8):
            self._document += 1
            utf8 = self.documents.utf8(self.order[self.first + self._document * self.stride])
        end = segment_end(utf8, self._byte)
        tokens = self.tokenizer.encode_array(bytes(utf8[self._byte : end]).decode("utf-8"))
        if end == len(utf8):
            tokens = np.append(tokens, np.int32(self.tokenizer.end_of_text_id))
        self._segments.append(_Segment(self._document, self._byte, tokens))
        self._document, self._byte = (self._document + 1, 0) if end == len(utf8) else (self._document, end)
        return tokens


def _check_sizes(logical_streams: int, global_batch_size: int, data_size: int) -> None:
    for key, value in (
        ("training.global_batch_size", global_batch_size),
        ("data.logical_streams", logical_streams),
    ):
        if value % data_size:
            raise UserError(
                f"{key} is {value}, which {data_size} data-parallel ranks do not divide: "
                f"make it a multiple of {data_size}"
            )


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
            f"{len(here['sources'])} now: put them back, or start a new run"
        )
    for index, (before, now) in enumerate(zip(saved["sources"], here["sources"], strict=True)):
        changed = _changes(before, now, ("weight", "documents", "bytes", "fingerprint"))
        if changed:
            raise UserError(
                f"data.train[{index}] ({now['name']}) is not the source of the saved data state: {changed}; "
                "put it back, or start a new run"
            )


def _changes(before: State, now: State, keys: Iterable[str]) -> str:
    return ", ".join(f"{key} was {before[key]} and is {now[key]}" for key in keys if before[key] != now[key])
