"""The cross-entropy and the rotation of queries and keys as Triton kernels, beside torch: bfloat16, in ns a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from benchmarks.gpu.device import Call, TimedDevice
from mf_train.kernels import triton_loss, triton_rotary
from mf_train.model import loss_steps
from mf_train.model.attention.rotary import rotary_table, rotate
from mf_train.model.sums import num_chunks

DTYPE = torch.bfloat16


def time_loss(device: TimedDevice) -> Mapping[str, float]:
    """Of a token's 50304 logits: their sums, and their gradient, which is written beside them here."""
    tokens, vocabulary = (6, 104) if device.rehearse else (8192, 50304)
    device.require(16 * tokens * vocabulary, f"the loss of {tokens} tokens")
    generator = torch.Generator(device.type).manual_seed(0)
    logits = torch.randn(tokens, vocabulary, generator=generator, device=device.type).to(DTYPE)
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device.type)
    chunk = vocabulary // num_chunks(vocabulary)
    numbers = (torch.logsumexp(logits.float(), -1), torch.ones(tokens, device=device.type), targets)
    leaf = logits.detach().requires_grad_()
    losses = F.cross_entropy(leaf, targets, reduction="none")
    upstream = torch.ones_like(losses)
    return _ns_a_token(
        device,
        tokens,
        {
            "triton": lambda: triton_loss.sums(logits, targets, chunk),
            "triton backward": lambda: triton_loss.gradient(logits, *numbers),
            "torch operations": lambda: loss_steps.sums(logits, targets, chunk),
            "torch operations backward": lambda: loss_steps.gradient(logits, *numbers),
            "F.cross_entropy": lambda: F.cross_entropy(logits, targets, reduction="none"),
            "F.cross_entropy backward": lambda: torch.autograd.grad(
                losses, leaf, upstream, retain_graph=True
            ),
        },
    )


def time_rotation(device: TimedDevice) -> Mapping[str, float]:
    """Of a token's 16 heads of 64 features, of which 16 turn; the backward pass is the same kernel."""
    rows, heads, length = (1, 2, 6) if device.rehearse else (16, 16, 2048)
    generator = torch.Generator(device.type).manual_seed(0)
    q, k = (
        torch.randn(rows, length, heads, 64, generator=generator, device=device.type)
        .to(DTYPE)
        .transpose(1, 2)
        for _ in range(2)
    )
    rotary = rotary_table(torch.arange(length, device=device.type), 16, 10000.0)
    return _ns_a_token(
        device,
        rows * length,
        {
            "triton": lambda: triton_rotary.turn(q, k, *rotary, back=False),
            "torch operations": lambda: (rotate(q, rotary), rotate(k, rotary)),
        },
    )


def _ns_a_token(device: TimedDevice, tokens: int, ways: Mapping[str, Call]) -> dict[str, float]:
    return {name: 1e9 * device.measure([way]) / tokens for name, way in ways.items()}


STEPS: dict[str, Callable[[TimedDevice], Mapping[str, float]]] = {
    "loss": time_loss,
    "rotation": time_rotation,
}
