"""What a standalone model's folder says to transformers: config.json and generation_config.json."""

import json
from dataclasses import asdict
from typing import Any

from mf_train.config import Config, ModelConfig
from mf_train.standalone.exported.names import CONFIG_KEYS, DOCUMENT_ATTENTION, INT8, TABLE_DTYPE

_CLASS = "modeling_memoryformer.MemoryFormerForCausalLM"


def settings_files(config: Config, dtype: str, end_of_text_id: int) -> dict[str, bytes]:
    """Contents of config.json and generation_config.json, by name. `dtype` is `convert`'s."""
    dtypes = {"dtype": "bfloat16", TABLE_DTYPE: INT8} if dtype == INT8 else {"dtype": dtype}
    special = {name: end_of_text_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    documents = {DOCUMENT_ATTENTION: True} if config.data.document_attention else {}
    return {
        "config.json": _json(_model_tree(config.model) | special | dtypes | documents),
        "generation_config.json": _json(special),
    }


def _model_tree(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["MemoryFormerForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_memoryformer.MemoryFormerConfig",
            "AutoModelForCausalLM": _CLASS,
            # a causal model is one; of a folder's own classes `transformers serve` (5.23) finds this one alone
            "AutoModelForDecision": _CLASS,
        },
        "model_type": "memoryformer",
        "tie_word_embeddings": False,
    } | {CONFIG_KEYS.get(name, name): value for name, value in asdict(model).items()}


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()
