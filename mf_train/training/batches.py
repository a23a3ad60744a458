"""The batch of a step on every rank: read by some ranks, agreed on by all, shared in each tensor-parallel group."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mf_train.config import Config
from mf_train.data.stream.digest import LIMBS, format_digest, from_limbs, rows_digest, to_limbs
from mf_train.data.stream.stream import TokenStream, merge_states, reading_ranks
from mf_train.data.workers.batches import BatchReader
from mf_train.errors import TrainingError, UserError
from mf_train.parallel.agreement import fail_together
from mf_train.parallel.collectives import collective
from mf_train.parallel.degrees import rows_of_rank
from mf_train.parallel.groups import Groups

_FLAGS = LIMBS + 2  # numbers of a rank's statement before its documents


class Batch(NamedTuple):
    """A rank's part of a global batch, and what the whole is known by."""

    rows: Tensor  # int64 [rows, S+1] on the device; the same on all ranks of a tensor-parallel group
    digest: str  # of the global batch
    epochs: list[float]  # passes over each source so far; empty on ranks that do not read
    wait_seconds: float  # that reading took


@dataclass
class _Ahead:
    """A batch that was read and is not trained on yet."""

    step: int
    rows: Tensor | None  # int32 [rows, S+1] where this rank reads
    failure: Exception | None
    wait_seconds: float
    totals: list[float] = field(default_factory=list)  # `_statement`, added over all ranks


class SharedBatches:
    """A run's batches in their order. A rank with a `stream` reads for its tensor-parallel group.

    A row is read by the rank that has its logical stream, and trained on by the rank that it is dealt to
    (`rows_of_rank`). Where the degrees divide batch and streams these are the same; else rows change ranks, so that
    any number of ranks has an even share.

    A batch is read one step ahead: `look_ahead` while the device computes, then `agree`, together with what else ranks
    tell each other at the end of a step, so that a step waits for the device once.

    The stream's first batch is that of step `first`.

    `stop` says whether this rank was asked to stop. `before_failing` is called on all ranks where one has no batch,
    before they raise. All calls but `look_ahead` and `close` are collective.
    """

    def __init__(
        self,
        stream: TokenStream | None,
        config: Config,
        groups: Groups,
        device: torch.device,
        *,
        first: int,
        stop: Callable[[], bool],
        before_failing: Callable[[], None],
        entering: Callable[[str], None],
    ) -> None:
        self.stream = stream
        self.reader = BatchReader(stream, config) if stream is not None else None
        self.config = config
        self.groups = groups
        self.device = device
        self.first = first
        self.stop = stop
        self.before_failing = before_failing
        self.entering = entering
        self._ahead: _Ahead | None = None

    def next(self, step: int) -> Batch | None:
        """The batch of a step; None where any rank was asked to stop before it was agreed on.

        Where any rank could not read its rows, or had met a failure, all raise as `fail_together`.
        """
        if self._ahead is None:
            self.look_ahead(step)
            self.agree(torch.zeros(0, device=self.device), torch.zeros(0, device=self.device))
        ahead = self._ahead
        assert ahead is not None and ahead.step == step and ahead.totals
        *limbs, stops, failures = ahead.totals[:_FLAGS]
        if failures:
            self.before_failing()
            fail_together(ahead.failure, self.device)
        if stops:
            return None
        self._ahead = None
        epochs = []
        if self.stream is not None:
            read = zip(ahead.totals[_FLAGS:], self.stream.sources, strict=True)
            epochs = [count / source.num_documents for count, source in read]
        digest = format_digest(from_limbs(limbs))
        return Batch(self.share(ahead.rows, step), digest, epochs, ahead.wait_seconds)

    def look_ahead(self, step: int, failure: Exception | None = None) -> None:
        """Read this rank's rows of a step, unless it has met a `failure`."""
        self.entering(f"reading the batch of step {step}")
        started, rows = time.perf_counter(), None
        if failure is None:
            rows, failure = self.read()
        self._ahead = _Ahead(step, rows, failure, time.perf_counter() - started)

    def agree(self, added: Tensor, beside: Tensor) -> list[float]:
        """Add over all ranks what they know of the batch ahead, if there is one, and the numbers `added`.

        Returns these sums and the numbers `beside`; one transfer brings all of them from the device.
        """
        own = self._statement()
        self.entering(
            f"agreeing on the batch of step {self._ahead.step}" if self._ahead else "ending the run"
        )
        shared = torch.cat((added.double(), own.to(self.device, non_blocking=True)))
        with collective("sum of losses and of what ranks say of the next batch", self.device):
            dist.all_reduce(shared)
        numbers: list[float] = torch.cat((beside.double(), shared)).tolist()
        if self._ahead is not None:
            self._ahead.totals = numbers[len(numbers) - len(own) :]
        return numbers[len(beside) : len(beside) + len(added)] + numbers[: len(beside)]

    def _statement(self) -> Tensor:
        """What this rank knows of the batch ahead, float64: its rows' digest in limbs, whether it is to stop, whether
        it has failed, and the documents read of each source. Sums of these are exact.
        """
        ahead, digest, documents = self._ahead, 0, [0] * len(self.config.data.train)
        if ahead is None:
            return torch.zeros(0, dtype=torch.float64)
        if ahead.rows is not None and self.reader is not None and self.stream is not None:
            digest = rows_digest(self.stream.row_numbers(ahead.step - self.first), ahead.rows.numpy())
            documents = self.reader.documents()
        flags = [int(self.stop()), int(ahead.failure is not None)]
        return torch.tensor([*to_limbs(digest), *flags, *documents], dtype=torch.float64)

    def read(self) -> tuple[Tensor | None, Exception | None]:
        """int32 [rows, S+1] where this rank reads, or what went wrong."""
        if self.reader is None:
            return None, None
        try:
            return torch.from_numpy(self.reader.next_batch()), None
        except (UserError, OSError, TrainingError) as error:
            return None, error

    def share(self, rows: Tensor | None, step: int) -> Tensor:
        """The group's rows [rows, S+1], int64 on the device of every rank of it."""
        config, degrees = self.config, self.groups.degrees
        if rows is None:
            mine = rows_of_rank(config, degrees.data_rank, degrees.data)
            rows = torch.empty(
                (len(mine), config.model.sequence_length + 1), dtype=torch.int32, device=self.device
            )
        else:
            if self.device.type == "cuda":
                rows = rows.pin_memory().to(self.device, non_blocking=True)
            if config.training.global_batch_size % degrees.data or config.data.logical_streams % degrees.data:
                rows = self._deal(rows, step)
        if degrees.tensor > 1:
            with collective("broadcast of the batch", self.device):
                dist.broadcast(rows, degrees.rank - degrees.tensor_rank, group=self.groups.tensor)
        return rows.long()

    def _deal(self, rows: Tensor, step: int) -> Tensor:
        """Rows as they were read [read, S+1] -> those of this rank, in the order of the batch. For ranks that read."""
        batch, streams = self.config.training.global_batch_size, self.config.data.logical_streams
        me, ranks = self.groups.degrees.data_rank, self.groups.degrees.data
        reader = reading_ranks(step - self.first, batch, streams, ranks)
        read = [row for row in range(batch) if reader[row] == me]
        mine = rows_of_rank(self.config, me, ranks)
        # by the rank that a row goes to, or comes from; the batch's order among equals
        sent = sorted(range(len(read)), key=lambda place: read[place] % ranks)
        received = sorted(range(len(mine)), key=lambda place: reader[mine[place]])
        to, by = Counter(row % ranks for row in read), Counter(reader[row] for row in mine)
        dealt = rows.new_empty((len(mine), rows.shape[1]))
        with collective("exchange of the batch's rows", self.device):
            dist.all_to_all_single(
                dealt,
                rows[torch.tensor(sent, dtype=torch.long, device=rows.device)],
                [by[rank] for rank in range(ranks)],
                [to[rank] for rank in range(ranks)],
                group=self.groups.data,
            )
        ordered = torch.empty_like(dealt)
        ordered[torch.tensor(received, device=rows.device)] = dealt
        return ordered

    def state(self, step: int) -> dict[str, Any] | None:
        """The stream's state for a checkpoint of `step`, on rank 0; None elsewhere.

        It does not depend on the number of ranks, nor on a batch that was read ahead.
        """
        if self.reader is None or self.stream is None:
            return None
        positions: list[Any] = [None] * self.groups.degrees.data
        # where reading ahead failed, nothing was given out: the last batch is one that was trained on
        given_out = self._ahead is not None and self._ahead.rows is not None
        dist.all_gather_object(
            positions, self.reader.positions(before_last=given_out), group=self.groups.data
        )
        if self.groups.degrees.rank != 0:
            return None
        read = {"step": step - self.first + 1, "identity": self.stream.identity()}
        return merge_states([{**read, "streams": streams} for streams in positions])

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
