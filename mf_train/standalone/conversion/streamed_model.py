"""The plain model with its weights left in files: a forward pass reads what it needs and drops it.

Of tables and embedding only the rows whose codes and tokens occur, of head and linear layers a slice of rows at a
time: memory does not grow with the model but with the tokens. The blocks' code is the plain model's; only the modules
that hold matrices are swapped.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import ModelConfig
from mf_train.kernels import lookup_int8
from mf_train.kernels.backends import find_backend
from mf_train.model.head import Head
from mf_train.model.matrix import Matrix
from mf_train.model.memory import Hash, Lookup, record_codes
from mf_train.model.model import Embedding, MemoryFormer
from mf_train.model.product_key import Values, weighted_rows
from mf_train.model.quantized import quantize_rows, scales_name
from mf_train.model.sums import num_chunks
from mf_train.standalone.exported.names import INT8, PARAMETER_PREFIX
from mf_train.standalone.folder import empty_model, open_tensors, read_config

READ_BYTES = 4 << 20  # float32 rows that are wanted at a time
TABLE_BYTES = 96 << 20  # a lookup's rows, of as many tokens as fit
_SPARSE = 4  # times as many rows as are wanted are read in one go


class Weights(Protocol):
    """Where a streamed model's weights are; `dtype` is that of its activations."""

    dtype: torch.dtype

    def rows(self, name: str, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows [n, last] of a parameter seen as [-1, last dimension], `indices` int64 [n] ascending: (values, None),
        or int8 values and their float32 scales [n].
        """


class CheckpointWeights:
    """A checkpoint's float32 masters, rounded as `convert` rounds them for `dtype` (its option's name)."""

    def __init__(self, reader: CheckpointReader, dtype: str) -> None:
        self._reader = reader
        self._int8 = dtype == INT8
        self.dtype: torch.dtype = torch.bfloat16 if self._int8 else getattr(torch, dtype)

    def rows(self, name: str, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        values = _read_dense(self._reader.rows, name, indices)
        return quantize_rows(values) if self._int8 and scales_name(name) else (values.to(self.dtype), None)


class FolderWeights:
    """The weights of a standalone folder as they are stored; `config` is its config.json's model section.

    `files` has the file of each tensor by outside name, `shapes` those of the parameters (not of int8 tensors).

    Raises UserError naming the file where it is damaged or another tensor than config.json asks for.
    """

    def __init__(self, folder: Path) -> None:
        self.config, self.dtype, int8 = read_config(folder)
        self.files = open_tensors(folder)
        tensors = {name: file.tensors[name] for name, file in self.files.items()}
        paths = {name: file.path for name, file in self.files.items()}
        model = empty_model(folder, self.config, self.dtype, int8, tensors, paths)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def rows(self, name: str, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        values, scales = self._read(name, indices), scales_name(name)
        if values.dtype != torch.int8 or scales is None:
            return values, None
        return values, self._read_elements(scales, indices)

    def _read(self, name: str, indices: Tensor) -> Tensor:
        outside = PARAMETER_PREFIX + name
        return _read_dense(self.files[outside].rows, outside, indices)

    def _read_elements(self, name: str, indices: Tensor) -> Tensor:
        """Elements of a tensor whose rows are short beside what is read of the values that they scale."""
        width = self.files[PARAMETER_PREFIX + name].tensors[PARAMETER_PREFIX + name].shape[-1]
        first = indices.min() // width
        rows = self._read(name, torch.arange(int(first), int(indices.max()) // width + 1))
        return rows.flatten()[indices - first * width]


def _read_dense(read: Callable[[str, Tensor], Tensor], name: str, indices: Tensor) -> Tensor:
    """Rows in ascending order; with those between where not many are, because a read costs as much as some rows."""
    first, span = int(indices[0]), int(indices[-1] - indices[0]) + 1
    if len(indices) < span <= _SPARSE * len(indices):
        return read(name, torch.arange(first, first + span))[indices - first]
    return read(name, indices)


def streamed_model(config: ModelConfig, weights: Weights) -> MemoryFormer:
    """The model on the CPU, for inference. Norms, biases, half keys and what attention has of its own are held."""
    with torch.device("meta"):
        model = MemoryFormer(config).to(weights.dtype)
    for name, module in list(model.named_modules()):
        if (streamed := _STREAMED.get(type(module))) is not None:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, streamed(name, module, weights))
    small = {}
    for name, value in model.state_dict().items():
        rows = torch.arange(value.numel() // value.shape[-1])
        small[name] = weights.rows(name, rows)[0].view(value.shape)
    model.load_state_dict(small, assign=True)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Results:
    """What a model computes on n tokens."""

    tokens: Tensor  # int64 [n]
    logits: Tensor  # float32 [n, V]
    codes: dict[str, Tensor]  # [n, K] of each hash, by its name


@torch.no_grad()
def compute(model: MemoryFormer, tokens: Tensor, forced: Mapping[str, Tensor] | None = None) -> Results:
    """Logits and codes on tokens [n]. With `forced` each hash hands on the codes given instead of those it computed,
    which are recorded.
    """
    with record_codes(model) as codes, _force_codes(model, forced or {}):
        logits = model(tokens.unsqueeze(0))[0].float()
    return Results(tokens, logits, {name: value[0] for name, value in codes.items()})


@contextmanager
def _force_codes(model: nn.Module, forced: Mapping[str, Tensor]) -> Iterator[None]:
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, Hash) and name in forced:
                hook = partial(_replace_codes, forced[name].unsqueeze(0))
                hooks.enter_context(module.register_forward_hook(hook))
        yield


def _replace_codes(codes: Tensor, module: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> Any:
    return codes, outputs[1]


class _PlainHash(Hash):
    """A Hash that calls the backend without torch's custom operator, whose first call imports torch's compiler: 150 MB
    and more than a second.
    """

    def __init__(self, name: str, plain: Hash, source: Weights) -> None:
        super().__init__(plain.bits, plain.temperature, plain.score)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, weights = find_backend("auto", x).hash_codes(
            x, x.shape[-1] // self.bits, self.temperature, self.score
        )
        return codes, weights


class _StreamedLookup(nn.Module):
    """A Lookup: codes and weights [..., K] -> [..., O]."""

    def __init__(self, name: str, plain: Lookup, source: Weights) -> None:
        super().__init__()
        self.name, self.source = f"{name}.tables", source
        self.num_tables, self.table_rows, self.features = plain.tables.shape
        self.bias = plain.bias

    def forward(self, codes: Tensor, weights: Tensor) -> Tensor:
        codes_nk, weights_nk = codes.flatten(0, -2).long(), weights.flatten(0, -2)
        tokens = max(TABLE_BYTES // (self.num_tables * self.features * 4), 1)
        parts = zip(codes_nk.split(tokens), weights_nk.split(tokens), strict=True)
        y_no = torch.cat([self._lookup(*part) for part in parts])
        return y_no.view(*codes.shape[:-1], self.features)

    def _lookup(self, codes_nk: Tensor, weights_nk: Tensor) -> Tensor:
        """A lookup in small tables of the rows that are read; all are as high as the one with the most rows needs."""
        first_row = torch.arange(self.num_tables) * self.table_rows
        rows, place_nk = torch.unique(codes_nk + first_row, return_inverse=True)
        table = rows // self.table_rows
        counts = torch.bincount(table, minlength=self.num_tables)
        height = 1 << max(math.ceil(math.log2(int(counts.max()))), 1)
        begin = counts.cumsum(0) - counts
        slots = torch.arange(len(rows)) - begin[table] + table * height
        values, scales = _gather(self.source, self.name, rows, slots, self.num_tables * height, self.features)
        codes_nk = place_nk - begin
        tables = values.view(self.num_tables, height, self.features)
        if scales is not None:
            return lookup_int8(codes_nk, weights_nk, tables, scales.view(tables.shape[:2])) + self.bias
        (y_no,) = find_backend("auto", tables, weights_nk).lookup(codes_nk, weights_nk, [tables])
        return y_no + self.bias


class _StreamedValues(nn.Module):
    """Values: codes and weights [..., R] -> [..., O]."""

    def __init__(self, name: str, plain: Values, source: Weights) -> None:
        super().__init__()
        self.name, self.source = f"{name}.tables", source
        self.features = plain.tables.shape[-1]
        self.bias = plain.bias

    def forward(self, codes: Tensor, weights: Tensor) -> Tensor:
        codes_nr, weights_nr = codes.flatten(0, -2).long(), weights.flatten(0, -2)
        tokens = max(TABLE_BYTES // (codes.shape[-1] * self.features * 4), 1)
        parts = zip(codes_nr.split(tokens), weights_nr.split(tokens), strict=True)
        return torch.cat([self._add_up(*part) for part in parts]).view(*codes.shape[:-1], self.features)

    def _add_up(self, codes_nr: Tensor, weights_nr: Tensor) -> Tensor:
        rows, places = torch.unique(codes_nr, return_inverse=True)
        values, scales = _gather(
            self.source, self.name, rows, torch.arange(len(rows)), len(rows), self.features
        )
        if scales is not None:
            values = values.float() * scales.unsqueeze(-1)
        return weighted_rows(places, weights_nr, values).to(weights_nr.dtype) + self.bias


def _gather(
    source: Weights, name: str, rows: Tensor, slots: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor | None]:
    """[height, width], and scales where there are, with `rows` of a parameter at `slots`; what is between is unset."""
    values: Tensor = torch.empty(0)
    scales: Tensor | None = None
    step = max(READ_BYTES // (width * 4), 1)
    for rows_part, slots_part in zip(rows.split(step), slots.split(step), strict=True):
        part, part_scales = source.rows(name, rows_part)
        if not values.numel():
            values = part.new_empty(height, width)
            scales = None if part_scales is None else part_scales.new_empty(height)
        values[slots_part] = part
        if scales is not None and part_scales is not None:
            scales[slots_part] = part_scales
    return values, scales


class _StreamedEmbedding(nn.Module):
    """An Embedding: integers [...] -> [..., D]."""

    def __init__(self, name: str, plain: Embedding, source: Weights) -> None:
        super().__init__()
        self.name, self.source = f"{name}.weight", source

    def forward(self, token_ids: Tensor) -> Tensor:
        rows, place = torch.unique(token_ids, return_inverse=True)
        return self.source.rows(self.name, rows)[0][place]


class _StreamedHead(Head):
    """A Head, or an Int8Head: [..., D] -> [..., V]."""

    def __init__(self, name: str, plain: Head, source: Weights) -> None:
        with torch.device("meta"):
            super().__init__(plain.in_features, plain.vocab_size, plain.softcap)
        del self.weight  # it stays where it is
        self.name, self.source = f"{name}.weight", source

    def forward(self, x: Tensor) -> Tensor:
        x_nd = x.flatten(0, -2)
        logits_nv = x.new_empty(len(x_nd), self.vocab_size)
        # the plain head's chunks, whose bits depend on their size; a larger one is cut for the sake of memory
        for rows in _slices(self.vocab_size, self.vocab_size // num_chunks(self.vocab_size), x.shape[-1]):
            values, scales = self.source.rows(self.name, rows)
            columns = logits_nv[:, rows[0] : rows[-1] + 1]
            if scales is None:
                torch.mm(x_nd, values.t(), out=columns)
            else:
                columns.copy_(F.linear(x_nd.float(), values.float()) * scales)
        return logits_nv.view(*x.shape[:-1], self.vocab_size)


class _StreamedLinear(nn.Module):
    """A linear layer: [..., I] -> [..., O]. One that is larger than TABLE_BYTES is multiplied in slices."""

    def __init__(self, name: str, plain: nn.Linear, source: Weights) -> None:
        super().__init__()
        self.name, self.source = f"{name}.weight", source
        self.features = plain.out_features
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for rows in _slices(self.features, self.features, x.shape[-1]):
            weight = self.source.rows(self.name, rows)[0]
            bias = None if self.bias is None else self.bias[rows[0] : rows[-1] + 1]
            parts.append(F.linear(x, weight, bias))
        return torch.cat(parts, dim=-1)


_STREAMED: dict[type[nn.Module], Callable[[str, Any, Weights], nn.Module]] = {
    Hash: _PlainHash,
    Lookup: _StreamedLookup,
    Values: _StreamedValues,
    Embedding: _StreamedEmbedding,
    Head: _StreamedHead,
    Matrix: _StreamedLinear,
}


def _slices(height: int, step: int, width: int) -> Iterator[Tensor]:
    """Row numbers 0 to height, `step` at a time, and fewer where those were more than TABLE_BYTES of float32."""
    most = max(TABLE_BYTES // (width * 4), 1)
    for begin in range(0, height, step):
        yield from torch.arange(begin, min(begin + step, height)).split(most)
