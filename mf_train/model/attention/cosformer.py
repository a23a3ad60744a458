"""cosFormer: linear attention whose weights fall with the distance (Qin et al. 2022, arXiv 2202.08791)."""

import math

import torch
from torch import Tensor

from mf_train.config.model import ModelConfig
from mf_train.model.attention.base import Attention, State
from mf_train.model.attention.linear import causal_mean, wide


class CosformerAttention(Attention):
    """Key j has the weight relu(q_i) . relu(k_j) cos(pi / 2 (i - j) / M) for query i (Eq. 10), M = `sequence_length`.

    The cosine of a difference is cos cos + sin sin, so features are relu(x) cos(pi / 2 i / M) and relu(x)
    sin(pi / 2 i / M). The cosine would fall below 0 at distances beyond M, where the paper says nothing: positions
    from M on count as M - 1 here, so that no weight is below 0, and distances among them have no influence.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.longest = config.sequence_length

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        dtype, (batch, _, length, _) = q.dtype, q.shape
        q, k, v = wide(q, k, v)
        past = q.new_zeros(batch, dtype=torch.long) if state is None else state[2]
        tokens = past.new_ones(batch, length) if padding is None else padding.long()
        numbers = past.unsqueeze(-1) + tokens.cumsum(-1)  # of tokens, a position's own included
        place = (numbers - 1).clamp(0, self.longest - 1)
        angles = (place.to(q.dtype) * (math.pi / 2 / self.longest))[:, None, :, None]
        turn = torch.cat([x.expand(-1, -1, -1, self.head_size) for x in (angles.cos(), angles.sin())], -1)
        q, k = q.relu().repeat(1, 1, 1, 2) * turn, k.relu().repeat(1, 1, 1, 2) * turn
        if padding is not None:
            k = k * tokens[:, None, :, None]
        y, kept = causal_mean(q, k, v, None if state is None else state[:2])
        return y.to(dtype), (*kept, numbers[:, -1])
