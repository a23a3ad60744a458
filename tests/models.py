"""Models whose every parameter is random, so that biases and affine maps matter."""

import torch

from mf_train.config import ModelConfig
from mf_train.model import MemoryFormer


def random_model(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float64, std: float = 0.4
) -> MemoryFormer:
    """Parameters are N(0, std^2), weights of norms N(1, std^2), drawn in float32."""
    generator = torch.Generator().manual_seed(seed)
    model = MemoryFormer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(middle + std * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)
