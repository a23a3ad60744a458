"""A run's reports on its tables: reads of every step, codes changed since the last checkpoint, alarms."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mf_train.checkpoint.probe import CODES, read_codes
from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import LoggingConfig
from mf_train.data.stream.validation import ValidationBlocks
from mf_train.parallel.engine import Engine
from mf_train.parallel.exchange import Exchange
from mf_train.telemetry.alarms import Alarms
from mf_train.telemetry.counts import ReadCounts
from mf_train.telemetry.statistics import HashStatistics, table_numbers
from mf_train.training.probe import probe_codes


class TableTelemetry:
    """Counts the codes of every step's passes, each tensor-parallel rank those of its own tables, and reports them
    every `telemetry_interval` steps. An interval of 0 costs nothing; a dense model has no tables.
    """

    def __init__(
        self,
        engine: Engine,
        exchange: Exchange | None,
        validation: ValidationBlocks | None,
        logging: LoggingConfig,
    ) -> None:
        self.engine = engine
        self.exchange = exchange
        self.validation = validation
        self.interval = logging.telemetry_interval
        self.alarms = Alarms(logging)
        self.counts: ReadCounts | None = None
        self.saved_at: int | None = None  # the last checkpoint's step, on every rank
        self.saved: Mapping[str, Tensor] = {}  # its probe's tokens and codes, on rank 0
        config, degrees = engine.model.config, engine.groups.degrees
        if self.interval and "memory" in config.layer_kinds:
            self.counts = ReadCounts(
                engine.model, config.num_tables, engine.device, degrees.tensor_rank, degrees.tensor
            )

    def counting(self) -> AbstractContextManager[None]:
        """Training passes within are counted."""
        return nullcontext() if self.counts is None else self.counts.counting()

    def resume(self, checkpoint: CheckpointReader) -> None:
        """Codes are compared with this checkpoint's until the next is saved. Raises UserError where it is damaged."""
        self.note_checkpoint(
            checkpoint.manifest.step,
            read_codes(checkpoint)
            if self.counts is not None and self.engine.groups.degrees.rank == 0
            else {},
        )

    def note_checkpoint(self, step: int, probe: Mapping[str, Tensor]) -> None:
        """Codes are compared with those of this probe from now on; it is looked at on rank 0 alone."""
        self.saved_at = step
        if self.engine.groups.degrees.rank == 0:
            self.saved = {
                name: value for name, value in probe.items() if name == "tokens" or name.startswith(CODES)
            }

    def report(self, step: int) -> dict[str, Any]:
        """Keys of metrics.jsonl for the passes since the last report (docs/telemetry.md); {} where none is due.

        Collective over all ranks, which get the same but for `codes_changed`: that is rank 0's.
        """
        if not self.interval or step % self.interval:
            return {}
        if self.counts is None:
            return {"tables": {}}
        hashes = self._gather()
        reads = int(hashes[0].numbers[0, 0])
        if not reads:
            return {"tables": {}}
        tables = {one.name: one.summary() for one in hashes}
        alarms = self.alarms.update(hashes)
        for name, standing in self.alarms.standing.items():
            tables[name]["alarming_tables"] = len(standing)
        changed = self._codes_changed()
        for name, share in changed.items():
            tables[name]["codes_changed"] = share
        report = {
            "tables": tables,
            "tables_tokens": reads,
            "codes_changed_since": self.saved_at if changed else None,
        }
        return report | ({"alarms": alarms} if alarms else {})

    def _gather(self) -> list[HashStatistics]:
        """All data-parallel ranks' counts in one reduction, then all tables' numbers in one gather. Starts anew."""
        assert self.counts is not None
        dist.all_reduce(self.counts.values, group=self.engine.groups.data)
        mine = [table_numbers(counts) for counts in self.counts.by_hash.values()]
        self.counts.clear()
        flat = torch.cat([numbers.flatten() for numbers in mine])
        gathered = flat.unsqueeze(0) if self.exchange is None else self.exchange.all_gather(flat)
        parts = gathered.cpu().split([numbers.numel() for numbers in mine], dim=1)
        return [
            HashStatistics(name, part.reshape(-1, numbers.shape[1]))
            for name, part, numbers in zip(self.counts.by_hash, parts, mine, strict=True)
        ]

    def _codes_changed(self) -> dict[str, float]:
        """Share of each hash's codes on the probe's tokens that are not the last checkpoint's.

        {} where there is no checkpoint, or none with the same tokens.
        """
        if self.saved_at is None:
            return {}
        now = probe_codes(self.engine, self.validation)
        before = self.saved
        if before.keys() != now.keys() or not torch.equal(before["tokens"], now["tokens"]):
            return {}
        return {
            name.removeprefix(CODES): (codes != before[name]).double().mean().item()
            for name, codes in now.items()
            if name.startswith(CODES)
        }
