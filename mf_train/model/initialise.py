"""The initial weights, all of them, as a function of (seed, parameter's name, place) alone."""

import hashlib
import math

import torch
from torch import Tensor, nn

from mf_train.config.model import ModelConfig
from mf_train.model.sharding import Shape, split_dimension
from mf_train.model.sums import num_chunks

TABLE_STD = 0.02


def initialise(model: nn.Module, seed: int, rank: int = 0, size: int = 1) -> None:
    """Set every parameter of a model, or of tensor-parallel rank `rank` of `size`, in place.

    | parameter | value |
    |---|---|
    | norm weights | 1 |
    | all biases | 0 |
    | tables | N(0, 0.02^2) |
    | embedding, head where `model.kind` is memoryformer | N(0, 0.02^2) |
    | embedding, head where `model.kind` is dense | N(0, 2 / (5 D)) (small init, arXiv 1910.05895) |
    | query, key, value, up, queries that are dense | N(0, 2 / (5 D)) |
    | output, down that are dense | N(0, (2 / (L sqrt(D)))^2) (as GPT-NeoX initialises Pythia) |
    | reduce [r, I], of low rank | N(0, 1 / I) |
    | skew, of rotations | 0 |
    | keys, of product_key | N(0, 2 / d): a score has variance 1 |
    | expand [O, r], of low rank | N(0, dense * I / r): the product has the variance of the dense one |
    | attention: key_summary, value_summary | N(0, 1 / c): a summary has a row's size |
    | attention: slots | N(0, 1): no two alike |
    | attention: filter | N(0, 1 / w): what is filtered keeps its size |
    | attention: pack_log_temperature, unpack_log_temperature, hash_threshold | 0 |
    | attention: anchors, hash_weight | N(0, 1) |

    Each matrix is drawn in up to 8 chunks of its split dimension, each with a generator of its own, on the CPU: a rank
    draws only what it holds, and every number of ranks and every device starts from the same weights.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        initialise_parameter(name, parameter, config, seed, rank, size)


@torch.no_grad()
def initialise_parameter(
    name: str, parameter: Tensor, config: ModelConfig, seed: int, rank: int = 0, size: int = 1
) -> None:
    """Set one parameter, by its name in the plain model, as `initialise` does."""
    std = _standard_deviation(name, parameter.shape, config)
    if std > 0:
        _fill_normal(parameter, std, seed, name, rank, size)
    else:
        parameter.fill_(
            0.0 if name.endswith((".bias", ".skew", "_log_temperature", ".hash_threshold")) else 1.0
        )


def _standard_deviation(name: str, shape: Shape, config: ModelConfig) -> float:
    """Of a parameter that is drawn; 0 for one that is set (norms, biases, rotations)."""
    module, _, kind = name.rpartition(".")
    if kind in ("bias", "skew") or "norm" in module.rpartition(".")[2]:
        return 0.0
    if module.endswith(".attention"):
        return _of_attention(kind, config)
    if kind == "tables" or (module in ("embedding", "head") and config.kind == "memoryformer"):
        return TABLE_STD
    if kind == "keys":
        return shape[-1] ** -0.5
    layer, _, half = module.rpartition(".")
    layer = layer.removesuffix("_path")
    if half == "reduce":
        return 1 / math.sqrt(shape[1])
    if half == "expand":
        inside = config.inner_size if layer.endswith(".down") else config.hidden_size
        return math.sqrt(inside / shape[1]) * _of_matrix(layer, config)
    return _of_matrix(module, config)


def _of_matrix(module: str, config: ModelConfig) -> float:
    if module.endswith((".output", ".down")):
        return 2 / (config.num_layers * math.sqrt(config.hidden_size))
    return math.sqrt(2 / (5 * config.hidden_size))


def _of_attention(parameter: str, config: ModelConfig) -> float:
    return {
        "key_summary": config.attention_segment**-0.5,
        "value_summary": config.attention_segment**-0.5,
        "slots": 1.0,
        "filter": config.attention_filter**-0.5,
        "pack_log_temperature": 0.0,
        "unpack_log_temperature": 0.0,
        "anchors": 1.0,
        "hash_weight": 1.0,
        "hash_threshold": 0.0,
    }[parameter]


def _fill_normal(parameter: Tensor, std: float, seed: int, name: str, rank: int, size: int) -> None:
    dimension = split_dimension(name)
    whole = parameter.shape[dimension] * size
    width = whole // num_chunks(whole)
    for index, part in enumerate(parameter.split(width, dimension)):
        chunk = rank * (parameter.shape[dimension] // width) + index
        digest = hashlib.blake2b(f"{seed}/{name}/{chunk}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = torch.empty(part.shape, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        part.copy_(drawn.normal_(0.0, std, generator=generator))
