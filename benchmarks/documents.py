"""`python -m benchmarks.documents`: attention inside documents against attention in whole rows, forward and backward.

Rows of 2,048 tokens, 8 heads of 64, as the tiny model has them. "mask": attention in whole rows with a
mask added to its scores, which attention inside documents was before it went document by document.
"""

import argparse
from functools import partial

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.tables import table
from mf_train.config import ModelConfig
from mf_train.doctor.timing import compare
from mf_train.model.attention.base import Context
from mf_train.model.attention.masks import Lengths, document_mask, document_positions
from mf_train.model.attention.rotary import rotary_table
from mf_train.model.attention.softmax import SoftmaxAttention
from mf_train.training.device import keep_freed_memory

ROWS, LENGTH, HEADS, HEAD = 4, 2048, 8, 64
# Log-normal lengths of tokens, median and sigma: web text, short texts, and one document a row
MIXTURES = {"web text": (350.0, 1.2), "short": (40.0, 0.8), "whole rows": (1e9, 0.0)}


def draw_documents(median: float, sigma: float) -> tuple[Lengths, Tensor]:
    """Lengths and numbers [B, S] of documents that fill the rows; those at a row's end are cut."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    for _ in range(ROWS):
        left = LENGTH
        while left:
            drawn = median * float(torch.randn((), generator=generator).mul(sigma).exp())
            lengths.append(max(1, min(left, int(drawn))))
            left -= lengths[-1]
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return tuple(lengths), numbers.view(ROWS, LENGTH)


def measure(dtype: torch.dtype, median: float, sigma: float) -> tuple[int, dict[str, float]]:
    """Number of documents, and seconds of a forward and backward pass each way."""
    lengths, numbers = draw_documents(median, sigma)
    attention = SoftmaxAttention(ModelConfig(hidden_size=HEADS * HEAD, num_heads=HEADS))
    inputs = [torch.randn(ROWS, LENGTH, HEADS * HEAD, dtype=dtype).requires_grad_() for _ in range(3)]
    gradient = torch.randn(ROWS, LENGTH, HEADS * HEAD, dtype=dtype)

    def both(positions: Tensor, mask: Tensor | None = None, documents: Lengths | None = None) -> None:
        rotary = rotary_table(positions, HEAD // 4, 10000.0)
        y = attention(*inputs, Context(rotary, mask, documents=documents))
        torch.autograd.grad(y, inputs, gradient)

    inside = document_positions(numbers)
    return len(lengths), compare(
        {
            "rows": partial(both, torch.arange(LENGTH)),
            "documents": partial(both, inside, documents=lengths),
            "mask": partial(both, inside, document_mask(numbers, dtype)),
        },
        seconds=8.0,
        warmup=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.documents", description=__doc__)
    parser.add_argument(
        "--save", action="store_true", help="also write benchmarks/results/DATE-documents.txt"
    )
    given = parser.parse_args()
    keep_freed_memory()  # as the trainer does
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, mixture in MIXTURES.items():
            documents, seconds = measure(dtype, *mixture)
            rows.append(
                [
                    f"{str(dtype).removeprefix('torch.')}, {name}",
                    str(documents),
                    *(f"{1000 * value:.0f}" for value in seconds.values()),
                    *(f"{seconds[key] / seconds['rows']:.2f}" for key in ("documents", "mask")),
                ]
            )
    columns = [f"{ROWS} rows of {LENGTH}", "documents", "rows ms", "documents ms", "mask ms"]
    lines = [
        f"attention with {HEADS} heads of {HEAD}, forward and backward; medians of interleaved calls",
        table([*columns, "documents / rows", "mask / rows"], rows),
    ]
    machine.report("documents", lines, save=given.save)


if __name__ == "__main__":
    main()
