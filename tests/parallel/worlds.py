"""Short trainings under every degree and stage, in one start of 4 processes, and the same training by torch alone."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.micro_batches import backward_passes
from mf_train.config import (
    Config,
    GroupConfig,
    GroupsConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from mf_train.data.stream.validation import IGNORED, ValidationBlocks
from mf_train.data.tokenizer import TokenIds
from mf_train.model import MemoryFormer
from mf_train.model.head import Head
from mf_train.model.memory import record_codes
from mf_train.model.sharding import split_dimension
from mf_train.parallel.degrees import Degrees, check_degrees
from mf_train.parallel.engine import MOMENTS, Engine
from mf_train.parallel.exchange import Exchange
from mf_train.parallel.groups import Groups, start_processes, stop_processes
from mf_train.parallel.kinds import AVERAGE, KINDS
from mf_train.parallel.processes import Process
from mf_train.parallel.tensor import TensorParallelHead, build_model
from mf_train.training.validate import validation_loss

Weights = dict[str, Tensor]

MODEL = ModelConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    bits=4,
    expand_bits=2,
    qk_norm=True,
    logit_softcap=3.0,
    vocab_size=128,
    sequence_length=16,
)
# Clipping is active at every step; decays and multipliers are large enough to show in the weights.
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3,
    table_learning_rate_multiplier=0.5,
    groups=GroupsConfig(
        ffn_tables=GroupConfig(learning_rate_multiplier=0.75, weight_decay=0.2),
        embedding=GroupConfig(weight_decay=0.1),
        head=GroupConfig(learning_rate_multiplier=0.7),
        norms=GroupConfig(learning_rate_multiplier=0.8, weight_decay=0.05),
    ),
    weight_decay=0.3,
    gradient_clip=0.3,
)
AVERAGE_DECAY = 0.75
STEPS, BATCH, MICRO = 10, 8, 2
ATTENTION = ("query", "key", "value")
END_OF_TEXT = 0  # a fifth of all tokens (see batch_of)
CPU = torch.device("cpu")


@dataclass(frozen=True, order=True)
class Case:
    """One training. `documents`: attention inside the documents of a row. `held`: how tables' moments, and masters, are
    held. `offload`: they are in host memory.
    """

    tensor: int
    data: int
    stage: int
    precision: str
    documents: bool = False
    held: tuple[str, str, str] = ("float32", "float32", "float32")
    offload: bool = False

    def __str__(self) -> str:
        kind = "-documents" * self.documents
        if set(self.held) != {"float32"}:
            kind += "-" + "-".join(self.held)
        kind += "-offload" * self.offload
        return f"P{self.tensor}-R{self.data}-stage{self.stage}-{self.precision}{kind}"


@dataclass
class Record:
    """What one rank saw of a training; collected tensors are this tensor-parallel rank's slices."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: Weights = field(default_factory=dict)  # of the first step, clipped
    state: dict[str, Weights] = field(default_factory=dict)  # all kinds after step 5
    codes: list[dict[str, Tensor]] = field(default_factory=list)  # of the probe after steps 1, 5 and the last
    probe_losses: dict[str, Tensor] = field(default_factory=dict)  # each row of the probe as one text
    validation: float = 0.0  # mean loss of the validation blocks after step 5
    held: dict[str, int] = field(default_factory=dict)  # elements of each parameter whose master is here
    tensor_rank: int = 0
    collected: bool = True  # state was collected on this data-parallel rank


def case_config(case: Case) -> Config:
    first, second, master = case.held
    return Config(
        model=MODEL,
        optimizer=replace(OPTIMIZER, table_exp_avg=first, table_exp_avg_sq=second),
        parallel=ParallelConfig(
            tensor=case.tensor,
            zero_stage=case.stage,
            master=master,
            offload="optimizer" if case.offload else "none",
        ),
        training=TrainingConfig(
            global_batch_size=BATCH,
            micro_batch_size=MICRO,
            precision=case.precision,
            average_decay=AVERAGE_DECAY,
        ),
    )


def batch_of(step: int) -> Tensor:
    """Tokens [BATCH, S + 1] of which some are far more frequent than others, so that there is much to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    uniform = torch.rand(BATCH, MODEL.sequence_length + 1, generator=generator)
    return (uniform.pow(3) * MODEL.vocab_size).long()


def probe() -> Tensor:
    tokens = torch.randint(MODEL.vocab_size, (4, 17), generator=torch.Generator().manual_seed(5))
    tokens[:, 5] = END_OF_TEXT
    return tokens


def validation() -> ValidationBlocks:
    """Five blocks and a part of a sixth, which is filled up."""
    tokens = batch_of(999).flatten()[: 5 * MODEL.sequence_length + 7]
    return ValidationBlocks(
        tokens.int().numpy(), TokenIds(MODEL.vocab_size, END_OF_TEXT), MODEL.sequence_length
    )


# the parallel training


def run_worlds(
    rank: int, world_size: int, worlds: list[tuple[list[int], int, list[Case]]]
) -> list[dict[str, Any]]:
    """Each world in turn: its ranks, its port, its cases. Returns this rank's results of each world.

    Larger worlds come first: DeepSpeed numbers parameters through the life of a process, and compares the
    numbers between ranks.
    """
    results = []
    for members, port, cases in worlds:
        found: dict[str, Any] = {}
        if rank in members:
            process = Process(members.index(rank), len(members), 0, "127.0.0.1", port)
            start_processes(process, CPU, 120)
            for case in cases:
                found[str(case)] = run_case(case, process)
            if len(members) == 4:
                found["cross-entropy"] = [compare_cross_entropy(process, tensor) for tensor in (2, 4)]
            stop_processes()
        results.append(found)
    return results


@functools.cache  # gloo's threads of each group wake up again and again until the process ends
def make_groups(process: Process, tensor: int) -> Groups:
    return Groups(Degrees(process.rank, process.world_size, tensor), 120)


def run_case(case: Case, process: Process, device: torch.device = CPU) -> Record:
    """One training on this process and its peers. What is recorded lies on the CPU, wherever it was trained."""
    config = case_config(case)
    check_degrees(config, process.world_size)
    groups = make_groups(process, case.tensor)
    degrees = groups.degrees
    model = build_model(MODEL, Exchange(groups.tensor) if case.tensor > 1 else None, 0, device)
    engine = Engine(model, config, groups, device, END_OF_TEXT if case.documents else None)
    last = degrees.data - 1  # the rank that collects is never the only one that it could be
    record = Record(tensor_rank=degrees.tensor_rank, collected=degrees.data_rank == last)
    for step in range(1, STEPS + 1):
        micro_batches = batch_of(step).to(device)[degrees.data_rank :: degrees.data].split(MICRO)
        loss = backward_passes(engine, micro_batches, BATCH)
        dist.all_reduce(loss, group=groups.data)
        record.losses.append(loss.item())
        record.norms.append(engine.update(OPTIMIZER.learning_rate).item())
        if step == 1:
            first = collect(engine, "exp_avg", last)
            record.gradients = {name: value / (1 - OPTIMIZER.betas[0]) for name, value in first.items()}
        if step == 5:
            record.state = {kind: collect(engine, kind, last) for kind in (*KINDS, AVERAGE)}
            record.probe_losses["as it is"] = probe_losses(engine)
            record.validation = validation_loss(engine, validation(), 2)
        if step in (1, 5, STEPS):
            record.codes.append(probe_codes(engine))
    record.held = {name: fragment.numel for name, fragment in engine.fragments().items()}
    halve_masters(engine)
    record.state["halved"] = collect(engine, "master", last)
    record.probe_losses["halved"] = probe_losses(engine)
    engine.close()
    return record


def collect(engine: Engine, kind: str, data_rank: int) -> Weights:
    """This tensor-parallel rank's parameters or moments in float32 on the data-parallel rank given; else empty."""
    groups = engine.groups
    mine = groups.degrees.data_rank == data_rank
    fragments = engine.fragments()
    found = {}
    for name, parameter in engine.model.named_parameters():
        shape = engine.local_shape(parameter)
        whole = torch.zeros(shape.numel(), device=engine.device)
        if (fragment := fragments.get(name)) is not None and (mine or not engine.replicated):
            held = fragment.held(kind).read()
            assert held.dtype == torch.float32
            whole[fragment.start : fragment.start + fragment.numel] = held
        dist.reduce(whole, dist.get_global_rank(groups.data, data_rank), group=groups.data)
        if mine:
            found[name] = whole.view(shape).cpu()
    return found


def probe_losses(engine: Engine) -> Tensor:
    tokens = probe().to(engine.device)
    with torch.no_grad():
        return engine.forward(tokens[:, :-1], tokens[:, 1:]).cpu()


def probe_codes(engine: Engine) -> dict[str, Tensor]:
    with record_codes(engine.model) as codes:
        probe_losses(engine)
    return {name: value.cpu() for name, value in codes.items()}


def halve_masters(engine: Engine) -> None:
    for fragment in engine.fragments().values():
        held = fragment.held("master")
        held.write(held.read() * 0.5)
    engine.refresh_parameters()


def compare_cross_entropy(process: Process, tensor: int) -> tuple[Tensor, Tensor]:
    """Largest difference of losses and of their gradients from megatron-core's, in float32, on groups of its own."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    groups = make_groups(process, tensor)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, create_gloo_process_groups=False)
    for group, expected_group in (
        (groups.tensor, parallel_state.get_tensor_model_parallel_group()),
        (groups.data, parallel_state.get_data_parallel_group()),
    ):
        assert dist.get_process_group_ranks(group) == dist.get_process_group_ranks(expected_group)
    generator = torch.Generator().manual_seed(tensor)
    whole = torch.randn(5, 3, 64, generator=generator) * 4
    targets = torch.randint(64, (5, 3), generator=generator)
    share = torch.rand(5, 3, generator=generator)
    head = Head(4, 64)
    head.weight = torch.nn.Parameter(head.weight.detach().chunk(tensor)[groups.degrees.tensor_rank])
    ours, theirs = (
        whole.chunk(tensor, dim=-1)[groups.degrees.tensor_rank].clone().requires_grad_() for _ in range(2)
    )
    split = TensorParallelHead(head, Exchange(groups.tensor))
    split.z_loss = 0.01
    losses = split.token_losses(ours, targets)
    expected = vocab_parallel_cross_entropy(theirs * 1, targets)  # it writes into its input
    losses.backward(share)
    expected.backward(share)
    assert ours.grad is not None and theirs.grad is not None and theirs.grad.abs().max() > 0.1
    z_loss = (2 * split.z_loss * share * whole.logsumexp(-1)).unsqueeze(-1) * whole.softmax(-1)
    theirs.grad += z_loss.chunk(tensor, dim=-1)[groups.degrees.tensor_rank]
    return (losses - expected).abs().max().detach(), (ours.grad - theirs.grad).abs().max()


# the same by torch alone


def losses_of_rows(model: MemoryFormer, tokens: Tensor, targets: Tensor, documents: bool) -> Tensor:
    """Loss of every token. `documents`: attention inside them (tests/model/test_documents.py proves the model's)."""
    numbers = torch.zeros_like(tokens)
    for row, number in zip(tokens, numbers, strict=True):
        for place in range(len(row) - 1):
            number[place + 1] = number[place] + (row[place] == END_OF_TEXT)
    losses: Tensor = model(tokens, targets, documents_bs=numbers if documents else None)
    return losses


def plain_validation(model: MemoryFormer, documents: bool) -> float:
    blocks = validation()
    device = model.head.weight.device
    inputs, targets = (
        torch.stack([torch.from_numpy(blocks[i][which]) for i in range(len(blocks))]).to(device)
        for which in (0, 1)
    )
    with torch.no_grad():
        losses = losses_of_rows(model, inputs, targets, documents)
    return losses[targets != IGNORED].double().mean().item()


def train_plainly(precision: str, documents: bool, device: torch.device = CPU) -> Record:
    """One process, torch's AdamW on float32 masters, gradients summed in float32; "float64": all of it in float64."""
    model = MemoryFormer(MODEL, seed=0).to(device)
    if precision == "float64":
        model.double()
    working = copy.deepcopy(model).to(torch.bfloat16) if precision == "bfloat16" else model
    masters = dict(model.named_parameters())
    tables = [p for n, p in masters.items() if n.split(".")[2:] in [[q, "tables"] for q in ATTENTION]]
    ffn_tables = [p for n, p in masters.items() if n.split(".")[2:] in (["up", "tables"], ["down", "tables"])]
    others = [p for n, p in masters.items() if "norm" in n or n.endswith(".bias")]
    assert len(tables) + len(ffn_tables) + 2 + len(others) == len(masters)
    rate = OPTIMIZER.learning_rate
    optimizer = torch.optim.AdamW(
        [
            {"params": tables, "lr": rate * 0.5},
            {"params": ffn_tables, "lr": rate * 0.75, "weight_decay": 0.2},
            {"params": [masters["embedding.weight"]], "weight_decay": 0.1},
            {"params": [masters["head.weight"]], "lr": rate * 0.7},
            {"params": others, "lr": rate * 0.8, "weight_decay": 0.05},
        ],
        lr=rate,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
    )
    record = Record()
    # a copy, where a float64 parameter would be itself
    averages = {name: p.detach().double().clone() for name, p in masters.items()}
    for step in range(1, STEPS + 1):
        sums = {name: torch.zeros_like(p) for name, p in masters.items()}
        loss = 0.0
        for rows in batch_of(step).to(device).split(MICRO):
            mean = losses_of_rows(working, rows[:, :-1], rows[:, 1:], documents).mean()
            gradients = torch.autograd.grad(mean * (MICRO / BATCH), list(working.parameters()))
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += gradient.to(sums[name].dtype)
            loss += mean.item() * MICRO / BATCH
        norm = torch.cat([g.double().flatten() for g in sums.values()]).norm().item()
        for name, parameter in masters.items():
            parameter.grad = sums[name] * min(1.0, OPTIMIZER.gradient_clip / norm)
        optimizer.step()
        for name, p in masters.items():
            averages[name] = AVERAGE_DECAY * averages[name] + (1 - AVERAGE_DECAY) * p.detach().double()
        record.losses.append(loss)
        record.norms.append(norm)
        if working is not model:
            with torch.no_grad():
                for name, parameter in working.named_parameters():
                    parameter.copy_(masters[name])
        if step == 1:
            record.gradients = {name: copied(p.grad) for name, p in masters.items() if p.grad is not None}
        if step == 5:
            record.validation = plain_validation(working, documents)
            record.state["master"] = {name: copied(p) for name, p in masters.items()}
            record.state[AVERAGE] = {
                name: copied(mean.to(masters[name].dtype)) for name, mean in averages.items()
            }
            for kind in MOMENTS:
                record.state[kind] = {n: copied(optimizer.state[p][kind]) for n, p in masters.items()}
        if step in (1, 5, STEPS):
            with record_codes(working) as codes:
                working(probe().to(device)[:, :-1])
            record.codes.append({name: value.cpu() for name, value in codes.items()})
    return record


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def join(parts: list[Weights]) -> Weights:
    """Whole parameters of the slices of tensor-parallel ranks in order."""
    return {name: torch.cat([part[name] for part in parts], split_dimension(name)) for name in parts[0]}
