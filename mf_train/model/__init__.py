"""The plain model, on one device: it reads like the paper and imports torch only."""

from mf_train.config.model import ModelConfig
from mf_train.model.model import MemoryFormer

__all__ = ["MemoryFormer", "ModelConfig"]
