"""`python -m benchmarks.fine_tuning MODEL`: which parts of a converted model to tune, on text of another kind.

Each part alone, at the best of some rates: the loss on held-out text of the new kind, and on the kind that the model
was trained on, which says what is forgotten. AdamW without weight decay; the rate rises in the first steps, then stays.
Rates are chosen by the held-out loss of the first seed; a seed is the order of the rows and what adapters begin with.
"""

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import machine
from benchmarks.tables import table

NEW, OLD = "docs/*.md", "configs/quickstart-text/validation/*.jsonl.gz"
LENGTH, BATCH, STEPS, WARM_UP = 128, 8, 60, 5
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
OLD_ROWS, HELD_OUT = 64, 5  # one row in so many is held out
READ_ROWS = "tables, rows that were read"
TABLES = ["query.tables", "key.tables", "value.tables", "up.tables", "down.tables"]
# which parameters, by name and value
PARTS: dict[str, Callable[[str, Tensor], bool]] = {
    "everything": lambda name, value: True,
    "tables": lambda name, value: name.endswith(".tables"),
    READ_ROWS: lambda name, value: name.endswith(".tables"),
    "head": lambda name, value: "head" in name,
    "embedding": lambda name, value: "embedding" in name,
    "norms and biases": lambda name, value: value.dim() == 1,
}
ADAPTERS = {
    "LoRA on the head": {"target_modules": ["model.head"]},
    "LoRA on tables": {"target_modules": [], "target_parameters": TABLES},
}


class RowAdam(torch.optim.Optimizer):
    """Adam of tables [K, rows, O] that leaves rows without a gradient, and their moments, as they are."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                    state["steps"] = torch.zeros(parameter.shape[:2])
                read = parameter.grad.any(-1)
                gradient, steps = parameter.grad[read], state["steps"][read] + 1
                first = state["first"][read].lerp(gradient, 0.1)
                second = state["second"][read].lerp(gradient.square(), 0.001)
                state["first"][read], state["second"][read], state["steps"][read] = first, second, steps
                first, second = first / (1 - 0.9 ** steps[:, None]), second / (1 - 0.999 ** steps[:, None])
                parameter[read] -= group["lr"] * first / (second.sqrt() + 1e-8)


def rows_of(tokenizer: Any, texts: Iterable[str]) -> Tensor:
    """Token ids [n, LENGTH] of texts, one behind another."""
    ids = [token for text in texts for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def old_texts() -> Iterator[str]:
    for path in sorted(Path().glob(OLD)):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


def load(folder: str, part: str, seed: int) -> nn.Module:
    """The model, of which only the part has gradients."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
    if part in ADAPTERS:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        adapted: nn.Module = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, **ADAPTERS[part]))
        return adapted
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(PARTS[part](name, parameter))
    trained: nn.Module = model
    return trained


@torch.no_grad()
def loss_on(model: Any, rows: Tensor) -> float:
    """Nats a token."""
    model.eval()
    return statistics.fmean(model(part, labels=part).loss.item() for part in rows.split(32))


def tune(folder: str, part: str, rate: float, seed: int, rows: Tensor) -> tuple[Any, float]:
    """The tuned model, and the median seconds of a step."""
    model: Any = load(folder, part, seed).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)
    if part == READ_ROWS:
        optimizer = RowAdam(parameters, rate)
    order, seconds = torch.Generator().manual_seed(seed), []
    for step in range(STEPS):
        began = time.perf_counter()
        batch = rows[torch.randint(len(rows), (BATCH,), generator=order)]
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARM_UP)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return model, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fine_tuning", description=__doc__)
    parser.add_argument(
        "model", help="a folder that memoryformer convert wrote, such as runs/quickstart/model"
    )
    parser.add_argument(
        "--save", action="store_true", help="also write benchmarks/results/DATE-fine-tuning.txt"
    )
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model, trust_remote_code=True)
    rows = rows_of(tokenizer, (path.read_text(encoding="utf-8") for path in sorted(Path().glob(NEW))))
    held_out, rows = rows[::HELD_OUT], rows[torch.arange(len(rows)) % HELD_OUT > 0]
    old = rows_of(tokenizer, old_texts())[:OLD_ROWS]
    plain: Any = load(given.model, "everything", 0)
    lines = [["nothing", "0", "", f"{loss_on(plain, held_out):.3f}", "", f"{loss_on(plain, old):.3f}", ""]]
    for part in (*PARTS, *ADAPTERS):
        first = {rate: loss_on(tune(given.model, part, rate, SEEDS[0], rows)[0], held_out) for rate in RATES}
        best = min(RATES, key=lambda rate: first[rate])
        new_losses, old_losses, seconds = [], [], []
        for seed in SEEDS:
            model, step = tune(given.model, part, best, seed, rows)
            new_losses.append(loss_on(model, held_out))
            old_losses.append(loss_on(model, old))
            seconds.append(step)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        spread = f"{min(new_losses):.3f} to {max(new_losses):.3f}"
        means = [f"{statistics.fmean(losses):.3f}" for losses in (new_losses, old_losses)]
        lines.append([part, f"{trained:,}", f"{best:g}", means[0], spread, means[1], f"{min(seconds):.3f}"])
        print(*lines[-1], flush=True)
    head = ["trained", "parameters", "rate", "new text, nats", "of 3 seeds", "old text, nats", "s a step"]
    words = f"{len(rows):,} rows of {LENGTH} tokens of {NEW}, {len(held_out)} held out; {STEPS} steps of {BATCH} rows"
    machine.report("fine-tuning", [words, table(head, lines)], save=given.save)


if __name__ == "__main__":
    main()
