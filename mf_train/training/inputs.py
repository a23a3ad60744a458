"""The tokenizer, token stream and validation text of a run's phases, and the check that all ranks read the same."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import NamedTuple

import torch
import torch.distributed as dist

from mf_train.config import Config
from mf_train.config.phases import Phase, named, phase_at, phases_of
from mf_train.config.sections import set_names
from mf_train.data.open_tokenizer import open_tokenizer
from mf_train.data.stream.stream import TokenStream
from mf_train.data.stream.validation import ValidationBlocks, set_tokens
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import PeerError, UserError
from mf_train.exit_status import MISTAKE
from mf_train.parallel.agreement import run_long_on_all
from mf_train.parallel.degrees import Degrees


@dataclass(frozen=True)
class Inputs:
    """Opened before the run starts, by every rank."""

    tokenizer: Tokenizer
    stream: TokenStream | None  # on the first rank of each tensor-parallel group, which reads for all of it
    validation_tokens: list[torch.Tensor]  # of each validation set, on rank 0


class PhaseInputs(NamedTuple):
    """What a phase reads."""

    inputs: Inputs
    validation: dict[str, ValidationBlocks]  # sets by name


def open_phases(
    config: Config,
    opened: dict[str, PhaseInputs],
    degrees: Degrees,
    device: torch.device,
    stop: Callable[[], bool],
    still_alive: Callable[[], None],
    step: int,
) -> bool:
    """Open what the phases of a run after `step` read, into `opened` by their names, unless it is there.

    All are opened before the first step: a mistake in the last one must not show after weeks. False where `stop()` was
    set on any rank. Collective over all ranks; raises UserError or OSError on rank 0, and PeerError on the others.
    """
    phases = phases_of(config)
    for phase in phases[phases.index(phase_at(config, step + 1)) :]:
        if phase.name in opened:
            continue
        inputs = run_long_on_all(partial(_open_inputs, phase, degrees), device, stop, still_alive)
        if inputs is None:
            return False
        with named(phase):
            check_same_sources(inputs.stream, phase.config, degrees.rank, device)
        validation = {}
        if phase.config.training.validation_interval:
            validation = share_validation(inputs.validation_tokens, inputs.tokenizer, phase.config, device)
        opened[phase.name] = PhaseInputs(inputs, validation)
    return True


def _open_inputs(phase: Phase, degrees: Degrees) -> Inputs:
    """Tokenizer, stream and validation text of a phase; UserError for any mistake in them."""
    config, validation, stream = phase.config, [], None
    length, limit = config.model.sequence_length, config.training.validation_sequences
    with named(phase):
        tokenizer = open_tokenizer(config.tokenizer, config.model.vocab_size)
        if degrees.tensor_rank == 0:
            stream = TokenStream(
                config.data,
                tokenizer,
                length,
                config.training.global_batch_size,
                degrees.data_rank,
                degrees.data,
            )
            stream.identity()  # looks into every source, so that what is wrong with one shows here
        if degrees.rank == 0 and config.training.validation_interval:
            found = set_tokens(config.data, tokenizer, length, limit)
            validation = [torch.from_numpy(each) for each in found]
    return Inputs(tokenizer, stream, validation)


def check_same_sources(stream: TokenStream | None, config: Config, rank: int, device: torch.device) -> None:
    """Refuse a run whose reading ranks do not see the same sources: its batches would depend on the ranks.

    A copy on one node may be incomplete, or a file still growing. Collective over all ranks; raises UserError on rank 0
    and PeerError on the others.
    """
    low = torch.full((len(config.data.train),), torch.iinfo(torch.int64).max, dtype=torch.int64)
    high = torch.zeros_like(low)
    if stream is not None:
        texts = [json.dumps(source).encode() for source in stream.identity()["sources"]]
        digests = [int.from_bytes(blake2b(text, digest_size=7).digest(), "little") for text in texts]
        low, high = torch.tensor(digests), torch.tensor(digests)
    low, high = low.to(device), high.to(device)
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    differ = (low != high).nonzero()
    if not len(differ):
        return
    if rank != 0:
        raise PeerError(MISTAKE)
    index = int(differ[0])
    source = config.data.train[index]
    raise UserError(
        f"data.train[{index}] ({source.path or source.hub}) is not the same for all ranks: make its files equal on all "
        "nodes, and wait until they are written"
    )


def share_validation(
    tokens: list[torch.Tensor], tokenizer: Tokenizer, config: Config, device: torch.device
) -> dict[str, ValidationBlocks]:
    """Every rank's validation sets by name, from rank 0's tokens. Collective over all ranks."""
    shared = {}
    for index, name in enumerate(set_names(config.data)):
        size = torch.tensor([len(tokens[index]) if tokens else 0], device=device)
        dist.broadcast(size, 0)
        here = (
            tokens[index].to(device) if tokens else torch.empty(int(size), dtype=torch.int32, device=device)
        )
        dist.broadcast(here, 0)
        shared[name] = ValidationBlocks(here.cpu().numpy(), tokenizer, config.model.sequence_length)
    return shared
