"""The plain model, on one device: it reads like the paper and imports torch only."""

from typing import TYPE_CHECKING, Any

from mf_train.config.model import ModelConfig

if TYPE_CHECKING:
    from mf_train.model.model import MemoryFormer

__all__ = ["MemoryFormer", "ModelConfig"]


def __getattr__(name: str) -> Any:
    """The model when it is asked for: counts and sizes are read without torch, which takes seconds to import."""
    if name == "MemoryFormer":
        from mf_train.model.model import MemoryFormer

        return MemoryFormer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
