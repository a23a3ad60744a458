"""Tasks of lm-evaluation-harness on the model in training: every rank answers its share of their requests.

Rank 0 alone runs lm-eval: it loads the tasks before the first step, shares the tokens that they ask about, and turns
the answers of all ranks into metrics.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mf_train.config import Config
from mf_train.config.phases import phases_of
from mf_train.data.stream.validation import IGNORED
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from mf_train.evaluation.harness import AskedTasks, Keys
from mf_train.parallel.agreement import run_long_on_all
from mf_train.parallel.engine import Engine

_KEYS = Keys(tasks="training.evaluate_tasks", include_path="training.evaluate_include_path")


class LiveTasks:
    """The tasks of a run: `asked` on rank 0; on every rank each request's tokens, and how many at their end are the
    continuation.
    """

    def __init__(self, asked: AskedTasks | None, tokens: list[Tensor], continuations: list[int]) -> None:
        self.asked = asked
        self.tokens = tokens
        self.continuations = continuations

    def evaluate(
        self, engine: Engine, batch_size: int, still_alive: Callable[[], None]
    ) -> dict[str, dict[str, float | None]]:
        """Of each task and group its metrics, on rank 0; {} elsewhere. Collective over all ranks."""
        answers = score(engine, self.tokens, self.continuations, batch_size, still_alive)
        if self.asked is None:
            return {}
        return self.asked.metrics([(likelihood, bool(greedy)) for likelihood, greedy in answers.tolist()])


def open_tasks(
    config: Config,
    tokenizer: Tokenizer,
    device: torch.device,
    stop: Callable[[], bool],
    still_alive: Callable[[], None],
) -> LiveTasks | None:
    """The tasks of `training.evaluate_tasks`; None where `stop()` was set on any rank. Collective over all ranks.

    Raises UserError for tasks that cannot be run, before anything is trained.
    """
    first = dist.get_rank() == 0
    loaded = run_long_on_all(
        lambda: (_load(config, tokenizer) if first else None,), device, stop, still_alive
    )
    if loaded is None:
        return None
    (asked,) = loaded
    requests = asked.requests if asked is not None else []
    sizes = [[len(each.context) + len(each.continuation), len(each.continuation)] for each in requests]
    flat = [token for each in requests for token in (*each.context, *each.continuation)]
    number = torch.tensor([len(sizes), len(flat)], device=device)
    dist.broadcast(number, 0)
    lengths = torch.tensor(sizes, dtype=torch.int32, device=device).view(-1, 2)
    tokens = torch.tensor(flat, dtype=torch.int32, device=device)
    if not first:
        lengths, tokens = lengths.new_empty(int(number[0]), 2), tokens.new_empty(int(number[1]))
    for shared in (lengths, tokens):
        dist.broadcast(shared, 0)
    whole, continuations = lengths.cpu().long().unbind(1)
    return LiveTasks(asked, list(tokens.cpu().split(whole.tolist())), continuations.tolist())


def _load(config: Config, tokenizer: Tokenizer) -> AskedTasks:
    training = config.training
    longest = min(phase.config.model.sequence_length for phase in phases_of(config))
    if not tokenizer.model_bytes:
        raise UserError(
            f"{_KEYS.tasks} asks about text and there is no tokenizer: set tokenizer.path to the one that made the "
            "shards, or leave the tasks out"
        )
    include = training.evaluate_include_path
    asked = AskedTasks(
        training.evaluate_tasks,
        Path(include) if include else None,
        _KEYS,
        training.evaluate_limit or None,
        tokenizer.encode,
        tokenizer.end_of_text_id,
    )
    for each in asked.requests:
        if not each.context or not 0 < len(each.continuation) <= longest:
            raise UserError(
                f"{_KEYS.tasks} {list(training.evaluate_tasks)}: a request has {len(each.context)} tokens of context "
                f"and {len(each.continuation)} of continuation, and the model answers for 1 or more and for 1 to "
                f"model.sequence_length, {longest}: leave the task out"
            )
    return asked


@torch.no_grad()
def score(
    engine: Engine,
    tokens: list[Tensor],
    continuations: list[int],
    batch_size: int,
    still_alive: Callable[[], None] = lambda: None,
) -> Tensor:
    """Log-likelihood of each request's continuation in nats, and 1 where each of its tokens is the likeliest, else 0:
    float64 [N, 2] on the CPU of every rank.

    A request that is longer than the model's sequence loses its beginning, as in lm-eval. Rank r of R takes requests
    r, r + R, ... of those ordered by length, longest first; collective over all ranks. `still_alive` is called after
    each batch.
    """
    degrees, longest = engine.groups.degrees, engine.model.config.sequence_length
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    mine = order[degrees.data_rank :: degrees.data]
    answers = torch.zeros(len(tokens), 2, dtype=torch.float64, device=engine.device)
    for start in range(0, -(-len(tokens) // degrees.data), batch_size):
        # every rank runs the same number of passes: one that has no request left runs one without targets
        batch = mine[start : start + batch_size]
        rows = [tokens[i][-longest - 1 :].long() for i in batch] or [torch.zeros(2, dtype=torch.long)]
        shape = len(rows), max(len(row) for row in rows) - 1
        inputs, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
        for place, (index, row) in enumerate(zip(batch, rows, strict=False)):
            end, count = len(row) - 1, continuations[index]
            inputs[place, :end] = row[:-1]
            targets[place, end - count : end] = row[-count:]
        inputs, targets = inputs.to(engine.device), targets.to(engine.device)
        losses, likeliest = engine.predictions(inputs, targets)
        greedy = ((likeliest == targets) | (targets == IGNORED)).all(-1)
        if batch:
            answers[batch, 0], answers[batch, 1] = -losses.sum(-1, dtype=torch.float64), greedy.double()
        still_alive()
    dist.all_reduce(answers, group=engine.groups.data)
    return answers.cpu()
