"""Initial weights: the docstring's table is what is drawn, and every rank draws its slice of the whole."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mf_train.config import ModelConfig
from mf_train.config.model import LEARNED_ATTENTION
from mf_train.model import MemoryFormer
from mf_train.model.initialise import initialise
from mf_train.model.sharding import split_dimension

CONFIGS = {
    "memoryformer": ModelConfig(hidden_size=96, num_layers=2, num_heads=8, bits=4, vocab_size=200),
    "dense": ModelConfig(kind="dense", hidden_size=96, num_layers=3, num_heads=8, vocab_size=200),
    "low rank": ModelConfig(
        kind="dense",
        qkv="low_rank",
        ffn="low_rank",
        output="low_rank",
        rank=48,
        hidden_size=96,
        num_layers=3,
        num_heads=8,
        vocab_size=200,
    ),
    "product keys": ModelConfig(
        ffn="product_key",
        product_keys=40,
        product_heads=8,
        product_query=32,
        hidden_size=96,
        num_layers=2,
        num_heads=8,
        bits=4,
        vocab_size=200,
    ),
    "hybrid": ModelConfig(
        qkv="dense",
        output="memory",
        residual_rank=48,
        rotation=True,
        hidden_size=96,
        num_layers=2,
        num_heads=8,
        bits=4,
        vocab_size=200,
    ),
}
CONFIGS |= {
    kind: replace(CONFIGS["memoryformer"], attention=kind, num_layers=1) for kind in LEARNED_ATTENTION
}


def documented_rows() -> list[tuple[str, str]]:
    """Parameter and value of each row of the docstring's table, without its head."""
    cells = re.findall(r"^ *\| (.+?) \| (.+?) \|$", initialise.__doc__ or "", re.MULTILINE)
    assert cells[0] == ("parameter", "value")
    return [cell for cell in cells[1:] if set(cell[0]) != {"-"}]


def documented_value(name: str, config: ModelConfig) -> str:
    """What the table says of one parameter, in D, L, I and r; exactly one row must."""
    owner, _, attribute = name.rpartition(".")
    layer, _, module = owner.rpartition(".")
    module = attribute if attribute in ("tables", "keys", "skew") else module

    def covers(row: str) -> bool:
        if row == "norm weights":
            return "norm" in module and attribute == "weight"
        if row == "all biases":
            return attribute == "bias"
        if row.startswith("attention:") or module == "attention":
            words = row.removeprefix("attention:").split(",")
            return module == "attention" and attribute in [word.strip() for word in words]
        if attribute == "bias" or "norm" in module:
            return False
        words, _, where = row.partition(" where ")
        names = [word.split()[0] for word in words.removesuffix("that are dense").split(",")]
        return module in names and where in ("", f"`model.kind` is {config.kind}")

    values = [value for row, value in documented_rows() if covers(row)]
    assert len(values) == 1, (name, values)
    value = _formula(values[0])
    if "dense *" in value:  # of the matrix in whose place it is
        whole = next(
            value
            for row, value in documented_rows()
            if row.endswith("dense") and layer.rpartition(".")[2].removesuffix("_path") in row
        )
        value = value.replace("dense", "(" + _formula(whole).removeprefix("N(0, "))
    return value


def _formula(value: str) -> str:
    """Without its source or reason."""
    return re.sub(r"( \((small|as) .*\)|: .*)$", "", value)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_is_as_the_docstring_s_table_says(kind: str) -> None:
    config = CONFIGS[kind]
    for name, parameter in MemoryFormer(config, seed=1).named_parameters():
        value = documented_value(name, config)
        if value in ("0", "1"):
            assert (parameter == float(value)).all(), name
            continue
        formula = re.match(r"N\(0, (.+)\)$", value)
        assert formula, value
        text = formula[1].replace("^", "**").replace("5 D", "5 * D").replace("L sqrt", "L * sqrt")
        known = {
            "D": config.hidden_size,
            "L": config.num_layers,
            "sqrt": math.sqrt,
            "d": config.product_query,
            "r": config.rank or config.residual_rank,
        }
        known["I"] = config.inner_size if ".down" in name else config.hidden_size
        known |= {"c": config.attention_segment, "w": config.attention_filter}
        variance = eval(text, known)
        assert_normal(parameter.detach(), math.sqrt(variance), name)


def assert_normal(x: Tensor, std: float, name: str) -> None:
    """Mean, standard deviation and kurtosis within 5 of their standard errors; as a whole and chunk by chunk."""
    for part in (x, *x.chunk(8, dim=split_dimension(name))):
        z, n = part.double() / std, part.numel()
        assert z.mean().abs() < 5 / math.sqrt(n), name
        assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / n), name
        assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / n), name
        assert z.unique().numel() > 0.99 * n, name


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_two_chunks_or_parameters_are_drawn_alike(kind: str) -> None:
    drawn = []
    for name, parameter in MemoryFormer(CONFIGS[kind]).named_parameters():
        if parameter.dim() > 1 and parameter.any():
            chunks = parameter.detach().chunk(8, dim=split_dimension(name))
            if len(chunks[0].flatten()) < 500:  # too few to tell: of small parameters no two chunks are equal
                assert len({tuple(chunk.flatten().tolist()) for chunk in chunks}) == len(chunks)
                continue
            drawn += [chunk.flatten()[:500] / chunk.std() for chunk in chunks]
    correlation = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(500)


def test_the_seed_decides() -> None:
    config = CONFIGS["memoryformer"]
    first, again, other = (MemoryFormer(config, seed=s).state_dict() for s in (3, 3, 4))
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == ("norm" in name or name.endswith("bias"))


@pytest.mark.parametrize(
    "settings",
    [{}, {"norm": "rmsnorm", "ffn_inner_norm": "rmsnorm"}, {"expand_bits": 0, "vocab_size": 8}],
    ids=["layernorm", "rmsnorm", "small vocabulary"],
)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_draw_the_slices_of_the_whole(size: int, settings: dict) -> None:
    config = ModelConfig(
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 8, "bits": 4, "vocab_size": 40, **settings}
    )
    whole = MemoryFormer(config, seed=5).state_dict()
    for rank in range(size):
        part = MemoryFormer(config, seed=99)
        for name, parameter in part.named_parameters():
            shape = list(parameter.shape)
            shape[split_dimension(name)] //= size
            parameter.data = torch.full(shape, torch.nan)
        initialise(part, 5, rank, size)
        for name, parameter in part.named_parameters():
            dimension = split_dimension(name)
            width = whole[name].shape[dimension] // size
            assert torch.equal(parameter, whole[name].narrow(dimension, rank * width, width)), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types_hold_the_same_draws(dtype: torch.dtype) -> None:
    model = MemoryFormer(CONFIGS["memoryformer"]).to(dtype)
    initialise(model, 0)
    for name, value in MemoryFormer(CONFIGS["memoryformer"], seed=0).state_dict().items():
        assert torch.equal(model.state_dict()[name], value.to(dtype))


def test_a_meta_model_is_left_unset() -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in MemoryFormer(CONFIGS["memoryformer"]).parameters())
