"""Flowformer: linear attention under conservation of flow, in its causal form (Wu et al. 2022, arXiv 2202.06258)."""

import torch
from torch import Tensor

from mf_train.model.attention.base import Attention, State
from mf_train.model.attention.linear import causal_sums, wide

_SMALLEST = 1e-6  # flow that is divided by


class FlowAttention(Attention):
    """Sources (keys) compete for what a sink (query) takes in, and a sink is allotted what its competitors leave.

    With features q = sigmoid(query) and k = sigmoid(key), all sums over the n_i positions up to i (section 3.2 and
    appendix on causal attention; its released code divides each flow by n_i, as here):

        I_i = q_i . sum k_j / n_i              what sink i takes in
        O_i = k_i . sum q_j / n_i              what source i gives
        I'_i = q_i . sum (k_j / O_j) / n_i     the same when every source gives 1
        O'_i = k_i . sum (q_j / I_j) / n_i     when every sink takes in 1; cut to [-1, 1], as in that code
        c_i = n_i exp(O'_i) / sum exp(O'_j)    competition
        y_i = sigmoid(I'_i) q_i . (sum k_j (c_j v_j)^T) / (n_i I_i)
    """

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        dtype, (batch, heads, length, size) = q.dtype, q.shape
        q, k, v = wide(q, k, v)
        # a sum over features adds in an order that depends on where they lie
        q, k = _sigmoid(q.contiguous()), _sigmoid(k.contiguous())
        tokens = q.new_ones(batch, length) if padding is None else padding.to(q.dtype)
        if padding is not None:
            q, k = q * tokens[:, None, :, None], k * tokens[:, None, :, None]
        if state is None:
            flows, competitors, past = q.new_zeros(batch, heads, 4, size), q.new_zeros(batch, heads), None
            count = q.new_zeros(batch)
        else:
            flows, competitors, count, past = state[0], state[1], state[2], state[3:]
        counts = count.unsqueeze(-1) + tokens.cumsum(-1)
        n = counts.clamp(min=1).unsqueeze(1)
        keys, queries = _running(k, flows[:, :, 0]), _running(q, flows[:, :, 1])
        taken = ((q * keys).sum(-1) / n).clamp(min=_SMALLEST)
        given = ((k * queries).sum(-1) / n).clamp(min=_SMALLEST)
        fair_keys = _running(k / given.unsqueeze(-1), flows[:, :, 2])
        fair_queries = _running(q / taken.unsqueeze(-1), flows[:, :, 3])
        allotted = _sigmoid((q * fair_keys).sum(-1) / n)
        strength = ((k * fair_queries).sum(-1) / n).clamp(-1, 1).exp() * tokens.unsqueeze(1)
        rivals = competitors.unsqueeze(-1) + strength.cumsum(-1)
        share = n * strength / rivals.clamp(min=_SMALLEST)
        y, past = causal_sums(q, k, v * share.unsqueeze(-1), past)
        y = y * (allotted / (n * taken)).unsqueeze(-1)
        flows = torch.stack([x[:, :, -1] for x in (keys, queries, fair_keys, fair_queries)], dim=2)
        return y.to(dtype), (flows, rivals[..., -1], counts[:, -1], *past)


def _sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x), whose last bit depends on nothing but x: torch's depends on the tensor's shape on a CPU."""
    return 1 / (1 + (-x.clamp(min=-80)).exp())


def _running(x: Tensor, before: Tensor) -> Tensor:
    """Sums over positions up to each, [B, H, S, head], that begin at those before, [B, H, head]."""
    return before.unsqueeze(2) + x.cumsum(2)
