"""What a standalone model's folder says about itself: config.json, generation_config.json and the model card."""

import json
from dataclasses import asdict
from typing import Any

from mf_train.config import Config, ModelConfig
from mf_train.model.counts import count_parameters
from mf_train.standalone.names import CONFIG_KEYS, DOCUMENT_ATTENTION, INT8, TABLE_DTYPE


def settings_files(
    config: Config, dtype: str, end_of_text_id: int, state: dict[str, Any]
) -> dict[str, bytes]:
    """Contents by file name. `dtype` is `convert`'s; `state` is the checkpoint's: step and tokens seen."""
    dtypes = {"dtype": "bfloat16", TABLE_DTYPE: INT8} if dtype == INT8 else {"dtype": dtype}
    special = {name: end_of_text_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    documents = {DOCUMENT_ATTENTION: True} if config.data.document_attention else {}
    return {
        "config.json": _json(_model_tree(config.model) | special | dtypes | documents),
        "generation_config.json": _json(special),
        "README.md": _model_card(config, dtype, state).encode(),
    }


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


def _model_card(config: Config, dtype: str, state: dict[str, Any]) -> str:
    model, counts = config.model, count_parameters(config.model)
    weights = dtype
    if dtype == INT8:
        weights = "int8 in tables and LM head, with a float32 scale for each row, and bfloat16 elsewhere"
    rows = "\n".join(f"| {name} | {value} |" for name, value in asdict(model).items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {"MemoryFormer" if model.kind == "memoryformer" else "Dense peer of a MemoryFormer"}

A causal language model of {counts.total:,} parameters, {counts.tables:,} of them in lookup tables
(MemoryFormer, arXiv 2411.12992), after {state["step"]:,} steps and {state["tokens"]:,} tokens of training in
{config.training.precision}. Weights are {weights}.
`certificate.json` has their hashes and how far this model's results are from the trainer's.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))
```

It needs torch and transformers only. The code files here are the plain model's own, under the Apache License 2.0.

| model | |
|---|---|
{rows}
"""


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()
