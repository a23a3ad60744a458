"""What a standalone model's folder says about itself: config.json, generation_config.json and the model card."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mf_train.checkpoint.layout import AVERAGE
from mf_train.config import Config, ModelConfig
from mf_train.config.groups import group_rules, groups_of
from mf_train.model.counts import count_parameters
from mf_train.standalone.exported.names import CONFIG_KEYS, DOCUMENT_ATTENTION, INT8, TABLE_DTYPE

_CARD_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


def settings_files(config: Config, dtype: str, end_of_text_id: int) -> dict[str, bytes]:
    """Contents of config.json and generation_config.json, by name. `dtype` is `convert`'s."""
    dtypes = {"dtype": "bfloat16", TABLE_DTYPE: INT8} if dtype == INT8 else {"dtype": dtype}
    special = {name: end_of_text_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    documents = {DOCUMENT_ATTENTION: True} if config.data.document_attention else {}
    return {
        "config.json": _json(_model_tree(config.model) | special | dtypes | documents),
        "generation_config.json": _json(special),
    }


def model_card(config: Config, certificate: Mapping[str, Any]) -> bytes:
    """README.md, from the run's configuration and the certificate (`certificate_tree`'s; its hashes are not read).

    Raises KeyError, TypeError, ValueError or AttributeError for a certificate that lacks figures.
    """
    import jinja2

    weights, shares = certificate["dtype"], certificate["probe"]["changed_codes"]
    if weights == INT8:
        weights = "int8 in tables and LM head, with a float32 scale for each row, and bfloat16 elsewhere"
    average = certificate["source"].get("weights") == AVERAGE
    if average:
        weights += f", the exponential average of the run's (decay {config.training.average_decay:g})"
    rules = group_rules(config.optimizer, config.model.hidden_size)
    usual = dict.fromkeys(rules, 1.0) | {"ffn_tables": rules["tables"].multiplier}
    others = [group for group in groups_of(config.model.kind) if group != "tables"]
    rates = {"tables": rules["tables"].multiplier} | {
        group: rules[group].multiplier for group in others if rules[group].multiplier != usual[group]
    }
    environment = jinja2.Environment(
        trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_CARD_TEMPLATE.read_text(encoding="utf-8"))
    try:
        card = template.render(
            **vars(config),
            **{part: certificate[part] for part in ("source", "probe", "replay")},
            counts=count_parameters(config.model),
            settings=asdict(config.model),
            weights=weights,
            rates=rates,
            before="checkpoint's average" if average else "trainer",
            worst=max(shares, key=lambda name: shares[name], default=None),
        )
    except jinja2.UndefinedError as error:
        raise KeyError(str(error)) from None
    return card.encode()


def _model_tree(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["MemoryFormerForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_memoryformer.MemoryFormerConfig",
            "AutoModelForCausalLM": "modeling_memoryformer.MemoryFormerForCausalLM",
        },
        "model_type": "memoryformer",
        "tie_word_embeddings": False,
    } | {CONFIG_KEYS.get(name, name): value for name, value in asdict(model).items()}


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()
