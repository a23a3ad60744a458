"""Tables and LM head in int8 with a float32 scale a row, for inference; every other weight stays as it is."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_train.kernels import lookup_int8
from mf_train.model.head import Head
from mf_train.model.memory import Lookup
from mf_train.model.model import MemoryFormer
from mf_train.model.product_key import Values, weighted_rows
from mf_train.model.sums import num_chunks

LARGEST = 127  # -128 is not used, so that a row and its negative are stored alike


def row_scales(values: Tensor) -> Tensor:
    """Float32 scales [...] of rows [..., C]: max |row| / 127, so 0 for a row of zeros.

    A row that holds NaN or infinity has a scale that is not finite.
    """
    return values.float().abs().amax(-1) / LARGEST


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., C] as int8 [..., C] and float32 scales [...]; row = scale * int8, nearly.

    int8 = round(value / scale), half to even, the quotient being a float32. For a value v whose row has a normal
    float32 as scale, |v - scale * int8| <= scale * (1/2 + 2^-16): half a step, and the quotient's own rounding.
    A row of zeros has scale 0 and is exact; a subnormal scale keeps fewer bits.
    """
    scales = row_scales(values)
    steps = torch.where(scales > 0, scales, 1).unsqueeze(-1)
    return (values.float() / steps).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scales


def scales_name(name: str) -> str | None:
    """The name of the scales of a parameter that `use_int8` stores as int8; None for one that it leaves alone."""
    if name.endswith(".tables") or name == "head.weight":
        return f"{name.rpartition('.')[0]}.scales"
    return None


class Int8Lookup(nn.Module):
    """A Lookup with int8 tables [K, 2^tau, O] and scales [K, 2^tau]: codes and weights [..., K] -> [..., O].

    The result has the weights' dtype, which must be the bias's.
    """

    tables: Tensor
    scales: Tensor

    def __init__(self, plain: Lookup | Values) -> None:
        super().__init__()
        tables, scales = quantize_rows(plain.tables.detach())
        self.register_buffer("tables", tables)
        self.register_buffer("scales", scales)
        self.bias = plain.bias

    def forward(self, codes: Tensor, weights: Tensor) -> Tensor:
        return lookup_int8(codes, weights, self.tables, self.scales) + self.bias


class Int8Values(Int8Lookup):
    """Values with an int8 table [1, N, O] and scales [1, N]: codes and weights [..., R] -> [..., O]."""

    def forward(self, codes: Tensor, weights: Tensor) -> Tensor:
        """The rows that are read become float32, each once."""
        rows, places = torch.unique(codes, return_inverse=True)
        values = self.tables[0, rows].float() * self.scales[0, rows].unsqueeze(-1)
        return weighted_rows(places, weights, values).to(weights.dtype) + self.bias


class Int8Head(Head):
    """A Head with int8 weight [V, D] and scales [V]; products are summed and scaled in float32, then rounded once."""

    scales: Tensor

    def __init__(self, plain: Head) -> None:
        with torch.device("meta"):
            super().__init__(plain.in_features, plain.vocab_size, plain.softcap)
        weight, scales = quantize_rows(plain.weight.detach())
        del self.weight  # a parameter, which int8 cannot be
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """[..., V] of x [..., D]. Raises ValueError where the scales are not float32 any more."""
        if self.scales.dtype != torch.float32:
            raise ValueError(f"head.scales is {self.scales.dtype}: an int8 model's scales must stay float32")
        wide = x.float()
        # by chunks, so that one chunk's rows are in float32 at a time
        chunk = self.vocab_size // num_chunks(self.vocab_size)
        parts = zip(self.weight.split(chunk), self.scales.split(chunk), strict=True)
        return torch.cat([(F.linear(wide, rows.float()) * scales).to(x.dtype) for rows, scales in parts], -1)


def use_int8(model: MemoryFormer) -> MemoryFormer:
    """Turn a plain model into an int8 one, in place, a module at a time. Meta tensors stay meta.

    Names of modules, of int8 tensors and of biases do not change; each int8 tensor has `scales` beside it.
    """
    for name, module in list(model.named_modules()):
        owner, _, attribute = name.rpartition(".")
        if type(module) is Lookup:
            setattr(model.get_submodule(owner), attribute, Int8Lookup(module))
        elif type(module) is Values:
            setattr(model.get_submodule(owner), attribute, Int8Values(module))
        elif type(module) is Head:
            setattr(model.get_submodule(owner), attribute, Int8Head(module))
    return model
