"""The configuration of a converted model as a `transformers` class; a converted model carries a copy of this file."""

from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from mf_train.config.model import ModelConfig
from mf_train.standalone.exported.names import CONFIG_KEYS, INT8


class MemoryFormerConfig(PretrainedConfig):
    """Every key of ModelConfig, four of them under transformers' names (see `CONFIG_KEYS`), and `table_dtype`.

    `table_dtype` is "int8" where tables and LM head are int8 with scales, else None; `use_cache` is forward's default.
    Raises ValueError where ModelConfig does, and for another `table_dtype`.
    """

    model_type = "memoryformer"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' way

    def __init__(self, table_dtype: str | None = None, use_cache: bool = True, **settings: Any) -> None:
        if table_dtype not in (None, INT8):
            raise ValueError(f"table_dtype is {table_dtype!r}: it must be {INT8!r} or absent")
        self.table_dtype, self.use_cache = table_dtype, use_cache
        model = ModelConfig(
            **{name: settings.pop(key) for name, key in _keys().items() if settings.get(key) is not None}
        )
        for name, key in _keys().items():
            setattr(self, key, getattr(model, name))
        settings.setdefault("tie_word_embeddings", False)
        super().__init__(**settings)

    @property
    def final_logit_softcapping(self) -> float | None:
        """The logits' cap under Gemma's name, which TRL reads; None for none."""
        return getattr(self, "logit_softcap", 0.0) or None

    def to_model_config(self) -> ModelConfig:
        """The plain model's configuration."""
        return ModelConfig(**{name: getattr(self, key) for name, key in _keys().items()})


def _keys() -> dict[str, str]:
    return {field.name: CONFIG_KEYS.get(field.name, field.name) for field in fields(ModelConfig)}
