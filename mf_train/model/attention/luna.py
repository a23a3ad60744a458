"""Attention through a few slots: Luna (Ma et al. 2021, arXiv 2106.01540), and with its input filtered first."""

import torch
from torch import Tensor, nn

from mf_train.config.model import ModelConfig
from mf_train.model.attention.base import Attention, State
from mf_train.model.attention.linear import causal_sums, wide
from mf_train.model.attention.per_head import weighted
from mf_train.model.attention.rows import attend_tokens_first, take


class LunaAttention(Attention):
    """y = f(softmax(f(q / sqrt(head), k, a)), a, v), with f(X, Y, Z)_t = 1/t X_t sum_(j <= t) Y_j^T Z_j.

    The causal form of section 3.3. a = omega(k P^T / sqrt(head)) [S, l], omega = elu + 1, says how much of a position
    is packed into each of l = `model.attention_slots` slots, whose queries P [l, head] are learned for each head. A
    slot's key and value are the means of what it packs, and a token unpacks by a softmax over the slots. (The paper's
    encoder hands what is packed to the next layer as its P. Here every token would have another one, so that each layer
    learns its own P.)

    The state, of constant size: `causal_sums`'s of k^T a and of a^T v, in float32, and the number of tokens [B].
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.slots = nn.Parameter(torch.empty(config.num_heads, config.attention_slots, config.head_size))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        dtype, scale = q.dtype, self.head_size**-0.5
        q, k, v, slots = wide(q, k, v, self.slots)
        packs = _elu_and_1(self.cooled(torch.einsum("bhsd,hld->bhsl", k, slots) * scale, 0))
        tokens = q.new_ones(q.shape[0], q.shape[2]) if padding is None else padding.to(q.dtype)
        if padding is not None:
            packs = packs * tokens[:, None, :, None]
        of_keys, of_values = (None, None) if state is None else (state[:2], state[2:4])
        count = tokens.cumsum(-1) if state is None else state[4][:, None] + tokens.cumsum(-1)
        n = count.clamp(min=1)[:, None, :, None]
        scores, of_keys = causal_sums(q * scale, k, packs, of_keys)
        unpacks = self.cooled(scores / n, 1).softmax(-1)
        y, of_values = causal_sums(unpacks, packs, v, of_values)
        return (y / n).to(dtype), (*of_keys, *of_values, count[:, -1])

    def cooled(self, scores: Tensor, which: int) -> Tensor:
        """Scores [B, H, S, l] over their temperature, which is 1: of packing (0) or unpacking (1)."""
        return scores


def _elu_and_1(x: Tensor) -> Tensor:
    """x + 1 above 0 and e^x below. (torch's elu rounds the last few of a tensor's numbers otherwise.)"""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


class FilteredLunaAttention(LunaAttention):
    """Luna whose packing reads filtered keys and values: k~_t = sum_(i < w) f_i k_(t-i), and v~_t likewise.

    ConvLuna of "On Difficulties of Attention Factorization through Shared Memory" (Yorsh et al. 2024, arXiv
    2404.00798): a convolution over positions before the memory, one kernel f for each head, of w =
    `model.attention_filter` positions, and learned temperatures of both attentions, here two for each head. The paper's
    convolution is centred. This one looks back only, and what it gives goes into Luna's causal form.

    The state: Luna's, and the last w - 1 keys and values [B, H, w - 1, head], 0 before the first.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.filter = nn.Parameter(torch.empty(config.num_heads, config.attention_filter))
        self.pack_log_temperature = nn.Parameter(torch.empty(config.num_heads))
        self.unpack_log_temperature = nn.Parameter(torch.empty(config.num_heads))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        return attend_tokens_first(self._attend_rows, q, k, v, padding, state)

    def _attend_rows(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        kept = self.filter.shape[1] - 1
        if state is None:
            last_k = last_v = k.new_zeros(*k.shape[:2], kept, k.shape[3])
        else:
            last_k, last_v = state[-2:]
        k, v = torch.cat((last_k, k), 2), torch.cat((last_v, v), 2)
        last = lengths[:, None] + torch.arange(kept, device=q.device)
        tokens = torch.arange(q.shape[2], device=q.device) < lengths[:, None]
        filtered = weighted(k, self.filter), weighted(v, self.filter)
        y, packed = super().attend(q, *filtered, tokens, None if state is None else state[:-2])
        return y, (*packed, take(k, last), take(v, last))

    def cooled(self, scores: Tensor, which: int) -> Tensor:
        temperature = (self.pack_log_temperature, self.unpack_log_temperature)[which]
        return weighted(scores, (-temperature).exp()[:, None])
