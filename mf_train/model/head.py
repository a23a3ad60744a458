"""The LM head, the model's only dense matrix, and the cross-entropy over a vocabulary that may be split over ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_train.kernels import fast_loss
from mf_train.kernels.composition import tree_sum
from mf_train.model.loss_steps import STEPS
from mf_train.model.sums import num_chunks, pairwise_sum

IGNORED = -100  # a target without a loss, as in torch.nn.functional.cross_entropy
_CAPPED_AT_ONCE = 2**22  # logits that are in float32 beside narrower ones


def soft_capped(logits: Tensor, softcap: float) -> Tensor:
    """cap tanh(logits / cap) of logits [..., V], in their memory (Gemma 2: arXiv 2408.00118, section 2); 0: no cap.

    It is computed in float32 (float64 for float64) and rounded once.
    """
    if not softcap:
        return logits
    capped: Tensor = _SoftCap.apply(logits, softcap)
    return capped


class Vocabulary:
    """The cross-entropy of logits over a vocabulary; tensor parallelism gathers sums of its parts."""

    first_token = 0  # the vocabulary's index of this rank's first row
    z_loss = 0.0  # how much of log(sum of exp(logits))^2 is added to a token's loss for its gradient

    def __init__(self, vocab_size: int, softcap: float = 0.0) -> None:
        self.vocab_size = vocab_size  # of the whole model, not of this rank's rows
        self.softcap = softcap  # cap of cap tanh(logits / cap); 0: none

    def gather_sums(self, sums: Tensor) -> Tensor:
        """This rank's values [...] -> every rank's, in rank order [..., P]."""
        return sums.unsqueeze(-1)

    def chunk(self) -> int:
        """Tokens of the vocabulary that are one chunk."""
        return self.vocab_size // num_chunks(self.vocab_size)

    def token_losses(self, logits: Tensor, targets: Tensor, *, raw: bool = False) -> Tensor:
        """Cross-entropy of each token in nats, float32 (float64 for float64 logits); 0 where the target is -100.

        logits [..., V / P], capped where there is a cap, targets [...] integers of the whole vocabulary. `raw` logits,
        the head's products that nobody else may read, are capped where they are, and the backward pass, which then
        runs once, puts the gradient there.

        The gradient is that of cross-entropy + `z_loss` log(Z)^2, Z the sum of exp(logits), capped ones where there is
        a cap (PaLM: Chowdhery et al. 2022, arXiv 2204.02311, section 5); the losses that are returned are the
        cross-entropy alone. Where log(Z) is below -1 / (2 z_loss), the gradient is NaN.
        """
        losses: Tensor = _CrossEntropy.apply(logits, targets, self, raw)
        return losses

    def likeliest(self, logits: Tensor) -> Tensor:
        """The token with the largest logit, the first of several: [..., V / P] -> [...]."""
        largest, place = logits.max(-1)
        # places are exact in float32 up to 2^24
        wide = torch.promote_types(logits.dtype, torch.float32)
        pairs = torch.stack((largest.to(wide), (place + self.first_token).to(wide)), dim=-1)
        of_ranks = self.gather_sums(pairs)
        first = of_ranks[..., 0, :].argmax(-1, keepdim=True)
        return of_ranks[..., 1, :].gather(-1, first).squeeze(-1).long()


class Head(Vocabulary, nn.Linear):
    """x [..., D] times the weight's rows [V, D]; tensor parallelism replaces the gathers and the scatter.

    Products are taken over fixed chunks of the vocabulary, so that a rank that holds some of the chunks computes
    them with the same bits. It is a linear layer as those know it who put another one in its place; `soft_capped` is
    left to the model, and `reset_parameters` to `initialise`.
    """

    def __init__(self, features: int, vocab_size: int, softcap: float = 0.0) -> None:
        nn.Linear.__init__(self, features, vocab_size, bias=False)
        Vocabulary.__init__(self, vocab_size, softcap)

    def reset_parameters(self) -> None:
        """Draws nothing."""

    def gather_features(self, x: Tensor) -> Tensor:
        """This rank's features -> all features of every token; without gradient."""
        return x

    def scatter_features(self, parts: Tensor) -> Tensor:
        """This rank's part of the gradient of all features -> the sum over ranks, of this rank's features."""
        return parts

    def forward(self, x: Tensor) -> Tensor:
        """Products with this rank's part of the vocabulary, not capped: [..., D] -> [..., V / P]."""
        logits: Tensor = _Logits.apply(x, self.weight, self)
        return logits


class _Logits(torch.autograd.Function):
    """x [..., D] times each chunk of the weight's rows, written side by side: [..., V / P]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, head: Head) -> Tensor:
        ctx.head, chunk = head, head.chunk()
        x = head.gather_features(x)
        ctx.save_for_backward(x, weight)
        if torch.compiler.is_compiling():  # which does not trace a result written into columns
            return torch.cat([F.linear(x, rows) for rows in weight.split(chunk)], dim=-1)
        logits = x.new_empty(*x.shape[:-1], weight.shape[0])
        x_nd, logits_nv = x.flatten(0, -2), logits.flatten(0, -2)
        for rows, columns in zip(weight.split(chunk), logits_nv.split(chunk, dim=-1), strict=True):
            torch.mm(x_nd, rows.t(), out=columns)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        chunk, x_nd = ctx.head.chunk(), x.flatten(0, -2)
        chunks = gradients[0].flatten(0, -2).split(chunk, dim=-1)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if d_weight is not None:
            for d_logits_nc, d_rows_cd in zip(chunks, d_weight.split(chunk), strict=True):
                torch.mm(d_logits_nc.t(), x_nd, out=d_rows_cd)
        d_x_nd = tree_sum(_wide_product(*pair) for pair in zip(chunks, weight.split(chunk), strict=True))
        return ctx.head.scatter_features(d_x_nd.view_as(x)).to(x.dtype), d_weight, None


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 for float64)."""
    if a.is_cuda and a.dtype != torch.float32 and a.dtype != torch.float64:
        return torch.mm(a, b, out_dtype=torch.float32)
    # a CPU's product of 16-bit values comes in 16 bits and no wider, and in float32 it takes three times as long
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))


def _soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap tanh(logits / cap) in the memory of contiguous logits, but where a compiler traces it."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return ((logits.to(wide) / cap).tanh() * cap).to(logits.dtype)
    for part in logits.view(-1).split(_CAPPED_AT_ONCE):
        part.copy_(part.to(wide).div_(cap).tanh_().mul_(cap))
    return logits


class _SoftCap(torch.autograd.Function):
    """cap tanh(logits / cap), whose derivative is 1 - (result / cap)^2."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cap: float) -> Tensor:
        capped = _soft_cap(logits, cap)
        if capped is logits:
            ctx.mark_dirty(logits)
        ctx.save_for_backward(capped)
        ctx.cap = cap
        return capped

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (capped,) = ctx.saved_tensors
        return gradients[0] * (1 - (capped / ctx.cap).square()), None


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target]; the logits and one normaliser a token are all that is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, head: Vocabulary, raw: bool) -> Tensor:
        ctx.softcap = head.softcap if raw else 0.0
        if ctx.softcap:
            logits = _soft_cap(logits, ctx.softcap)
        steps = fast_loss(logits) or STEPS
        local = targets - head.first_token
        local = torch.where((local >= 0) & (local < logits.shape[-1]), local, -1)
        parts = head.gather_sums(steps.sums(logits, local, head.chunk()))
        # every rank's chunks side by side: from here on the same numbers in the same places for every P
        largest_of, totals, picked = parts.transpose(-1, -2).flatten(-2).contiguous().unbind(-2)
        largest = largest_of.amax(-1)
        log_total = pairwise_sum(totals * (largest_of - largest.unsqueeze(-1)).exp()).log()
        # one chunk has the target's logit and the others zero, so this sum is exact
        shifted = pairwise_sum(picked) - largest
        valid = targets != IGNORED
        ctx.save_for_backward(logits, local, valid, largest + log_total)
        ctx.z_loss = head.z_loss
        ctx.overwrite = raw and not torch.compiler.is_compiling()
        return torch.where(valid, log_total - shifted, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        logits, local, valid, normaliser = ctx.saved_tensors
        factor = torch.where(valid, gradients[0], 0).to(normaliser.dtype)
        if ctx.z_loss:
            # z log(Z)^2 adds 2 z log(Z) softmax: the softmax's factor 1 + 2 z log(Z) goes into its normaliser
            normaliser = normaliser - (2 * ctx.z_loss * normaliser).log1p()
        steps = fast_loss(logits) or STEPS
        d_logits = steps.gradient(
            logits, normaliser, factor, local, overwrite=ctx.overwrite, softcap=ctx.softcap
        )
        # a second backward pass, or another that needs these logits, then gets torch's error
        if ctx.overwrite:
            torch.autograd.graph.increment_version(logits)
        return d_logits.detach(), None, None, None
