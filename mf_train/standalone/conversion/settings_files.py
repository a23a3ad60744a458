"""What a standalone model's folder says about itself: config.json, generation_config.json and the model card."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mf_train.config import Config, ModelConfig, SourceConfig
from mf_train.model.counts import count_parameters
from mf_train.standalone.exported.names import CONFIG_KEYS, DOCUMENT_ATTENTION, INT8, TABLE_DTYPE


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
    """README.md, from the run's configuration and the certificate (`certificate_tree`'s; its hashes are not read)."""
    model, training, counts = config.model, config.training, count_parameters(config.model)
    source, probe, replay = certificate["source"], certificate["probe"], certificate["replay"]
    weights = certificate["dtype"]
    if weights == INT8:
        weights = "int8 in tables and LM head, with a float32 scale for each row, and bfloat16 elsewhere"
    text = "of the run's validation text" if probe["text"] == "validation" else "drawn at random"
    flips = probe["changed_codes"]
    worst = max(flips, key=lambda name: flips[name], default=None)
    figures = {
        "tokens compared": f"{len(probe['tokens'])}, {text}",
        "largest difference of a logit": f"{probe['largest_logit_difference']:.3g}",
        "largest share of a layer's codes that changed": f"{flips[worst]:.3%} ({worst})"
        if worst
        else "no codes",
        "loss, trainer and this model": f"{probe['recorded_loss']:.4f} and {probe['loss']:.4f} nats a token",
        "perplexity, trainer and this model": f"{probe['recorded_perplexity']:.2f} and {probe['perplexity']:.2f}",
        "the checkpoint's weights against the trainer": "equal codes, logits within "
        f"{replay['largest_logit_difference']:.2g}"
        if replay["exact"]
        else f"logits within {replay['relative_logit_error']:.2%} of their spread, layer by layer",
        "the files against the checkpoint's weights": "equal to the bit",
    }
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {"MemoryFormer" if model.kind == "memoryformer" else "Dense peer of a MemoryFormer"}

A causal language model of {counts.total:,} parameters, {counts.tables:,} of them in lookup tables
(MemoryFormer, arXiv 2411.12992), after {source["step"]:,} steps and {source["tokens"]:,} tokens of training in
{training.precision}. Weights are {weights}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))
```

It needs torch and transformers only. The code files here are the plain model's own, under the Apache License 2.0.

## Training

{_table(_training(config, source))}
{_sources("Trained on", config.data.train)}{_sources("Validated on", config.data.validation)}
## Conversion

{_table(figures)}
`certificate.json` has these figures for each layer, and the SHA-256 of every tensor and file.
`memoryformer convert CHECKPOINT FOLDER --check` computes all of it again.

## Configuration

{_table(asdict(model))}""".encode()


def _training(config: Config, source: Mapping[str, Any]) -> dict[str, Any]:
    training, metrics = config.training, source["metrics"]
    rows: dict[str, Any] = {
        "steps": f"{source['step']:,} of {training.steps:,}",
        "tokens": f"{source['tokens']:,}",
        "batch": f"{training.global_batch_size:,} sequences of {config.model.sequence_length:,} tokens",
        "peak learning rate": f"{config.optimizer.learning_rate:g}, of tables times "
        f"{config.optimizer.table_learning_rate_multiplier:g}",
        "precision": training.precision,
        "attention": "inside documents" if config.data.document_attention else "inside blocks",
    }
    if "loss" in metrics:
        rows["loss of the last step"] = f"{metrics['loss']:.4f} nats a token"
    if "validation_loss" in metrics:
        step = metrics.get("validation_step", source["step"])
        rows["validation loss"] = f"{metrics['validation_loss']:.4f} nats a token, after step {step:,}"
    return rows


def _sources(title: str, sources: tuple[SourceConfig, ...]) -> str:
    if not sources:
        return ""
    lines = [f"- `{source.path or source.hub}`, weight {source.weight:g}" for source in sources]
    return "\n".join([f"\n{title}:\n", *lines, ""])


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""])


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
