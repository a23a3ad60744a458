"""The LM head, the model's only dense matrix, and the cross-entropy over a vocabulary that may be split over ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_train.model.sums import chunk_sums, num_chunks, pairwise_sum

IGNORED = -100  # a target without a loss, as in torch.nn.functional.cross_entropy


class Head(nn.Module):
    """Logits of x [..., D] and their cross-entropy. Tensor parallelism replaces the three gathers.

    The product is taken over fixed chunks of the vocabulary, so that a rank that holds some of the chunks computes
    them with the same bits.
    """

    first_token = 0  # the vocabulary's index of this rank's first row

    def __init__(self, features: int, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size  # of the whole model, not of this rank's rows
        self.weight = nn.Parameter(torch.empty(vocab_size, features))

    def gather_features(self, x: Tensor) -> Tensor:
        """This rank's features -> all features of every token."""
        return x

    def gather_sums(self, sums: Tensor) -> Tensor:
        """This rank's values [...] -> every rank's, in rank order [..., P]."""
        return sums.unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of this rank's part of the vocabulary: [..., D] -> [..., V / P]."""
        x = self.gather_features(x)
        chunks = self.weight.split(self.vocab_size // num_chunks(self.vocab_size))
        return torch.cat([F.linear(x, chunk) for chunk in chunks], dim=-1)

    def token_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token in nats, float32 (float64 for float64 logits); 0 where the target is -100.

        logits [..., V / P] as `forward` returns them, targets [...] integers of the whole vocabulary.
        """
        losses: Tensor = _CrossEntropy.apply(logits, targets, self)
        return losses


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target]; the logits and one normaliser a token are all that is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, head: Head) -> Tensor:
        wide = logits.to(_loss_dtype(logits.dtype))
        largest = head.gather_sums(wide.amax(-1)).amax(-1)
        chunk = head.vocab_size // num_chunks(head.vocab_size)
        shifted = wide - largest.unsqueeze(-1)
        total = pairwise_sum(head.gather_sums(chunk_sums(shifted.exp(), chunk)))
        local = targets - head.first_token
        mine = (local >= 0) & (local < logits.shape[-1])
        local = torch.where(mine, local, 0)
        # one rank has the target's logit and the others zero, so this sum is exact
        picked = torch.where(mine, shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1), 0)
        picked = pairwise_sum(head.gather_sums(picked))
        valid = targets != IGNORED
        ctx.save_for_backward(logits, local, mine, valid, largest + total.log())
        return torch.where(valid, total.log() - picked, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        logits, local, mine, valid, normaliser = ctx.saved_tensors
        gradient = torch.where(valid, gradients[0], 0).to(normaliser.dtype)
        d_logits = (logits.to(normaliser.dtype) - normaliser.unsqueeze(-1)).exp_()
        d_logits.mul_(gradient.unsqueeze(-1))
        at_target = torch.where(mine, -gradient, 0).unsqueeze(-1)
        d_logits.scatter_add_(-1, local.unsqueeze(-1), at_target)
        return d_logits.to(logits.dtype), None, None


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
