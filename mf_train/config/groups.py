"""The groups of parameters that have a learning rate and a weight decay of their own (`optimizer.groups`).

    tables        of the query, key and value layers, and of an output layer
    ffn_tables    of the FFN: both its layers, or the values of a product-key memory
    embedding     of the tokens
    head          the LM head
    matrices      of layers that are dense or of low rank; queries and keys of a product-key memory;
                  rotations
    attention     what attention has of its own: Linformer's summaries, Luna's slots, EcoFormer's hash
    norms         norms, and the biases of all layers

The width rule `mup` (Yang et al. 2022, arXiv 2203.03466, table 3, Adam) is to keep the best learning rate while the
hidden size D changes. An update of Adam moves each number by about the rate, whatever its gradient's size. A matrix's
output adds up D of them in one direction, so its rate goes as 1 / D, and the head's. A memory layer's output is a sum
over K tables of weight times row, of which an update moves each row that is read: K of them in one direction, and K is
D / tau. So at the same tau a table's rate goes as 1 / D too. An embedding, a norm or a bias is used as it is, and
attention's own weights are summed over a head or a segment: their rates stay. Rate times decay, the share that an
update takes off a number, stays for all, as with the authors' optimisers.
"""

from dataclasses import asdict, fields
from typing import NamedTuple

from mf_train.config.model import ModelConfig
from mf_train.config.sections import Config, GroupsConfig, OptimizerConfig

GROUPS = tuple(field.name for field in fields(GroupsConfig))
_BY_WIDTH = ("tables", "ffn_tables", "head", "matrices")


class Rule(NamedTuple):
    """A group's rate, as a multiple of `optimizer.learning_rate`, and its weight decay."""

    multiplier: float
    weight_decay: float


def group_of(name: str, dimensions: int) -> str:
    """The group of a parameter, by its name in the plain model and its number of dimensions."""
    if name.endswith(".tables"):
        return "ffn_tables" if name.endswith((".up.tables", ".down.tables", ".values.tables")) else "tables"
    if dimensions < 2:
        return "norms"
    if ".attention." in name:
        return "attention"
    return {"embedding.weight": "embedding", "head.weight": "head"}.get(name, "matrices")


def group_rules(optimizer: OptimizerConfig, hidden_size: int) -> dict[str, Rule]:
    """What each group has in a model of `hidden_size`: its own, or the FFN's tables those of `tables`, or all's."""
    base = optimizer.base_hidden_size if optimizer.width_rule == "mup" else None
    width = (base or hidden_size) / hidden_size
    rules = {}
    for group in GROUPS:
        given = [optimizer.groups.tables] if group == "ffn_tables" else []
        given.append(getattr(optimizer.groups, group))  # the last one that says something counts
        multiplier = optimizer.table_learning_rate_multiplier if group in ("tables", "ffn_tables") else 1.0
        decay = 0.0 if group == "norms" else optimizer.weight_decay
        for each in given:
            if each.learning_rate_multiplier is not None:
                multiplier = each.learning_rate_multiplier
            if each.weight_decay is not None:
                decay = each.weight_decay
        scale = width if group in _BY_WIDTH else 1.0
        rules[group] = Rule(multiplier * scale, decay / scale)
    return rules


def groups_of(model: ModelConfig) -> list[str]:
    """The groups that a model has."""
    kinds = model.layer_kinds
    has = {
        # also where only the FFN has some, which go by these settings
        "tables": bool(kinds & {"memory", "product_key"}),
        "ffn_tables": model.ffn_kind in ("memory", "product_key"),
        "matrices": kinds != {"memory"} or model.residual_rank > 0 or model.rotation,
        "attention": model.has_attention_weights,
    }
    return [group for group in GROUPS if has.get(group, True)]


def groups_problem(config: Config) -> str:
    """An error about the groups and the width rule of a configuration; empty where they fit."""
    optimizer = config.optimizer
    for group in GROUPS:
        given = asdict(getattr(optimizer.groups, group))
        if group not in groups_of(config.model) and any(value is not None for value in given.values()):
            model = f"{config.model.description}, attention {config.model.attention}"
            return f"optimizer.groups.{group} is set and the model ({model}) has none: leave it out"
    multiplier = optimizer.table_learning_rate_multiplier
    if multiplier != 1 and optimizer.groups.tables.learning_rate_multiplier is not None:
        return (
            f"optimizer.table_learning_rate_multiplier is {multiplier:g} and optimizer.groups.tables."
            f"learning_rate_multiplier is {optimizer.groups.tables.learning_rate_multiplier:g}: keep one of them"
        )
    base = optimizer.base_hidden_size
    if optimizer.width_rule != "none" and base is None:
        return (
            f"optimizer.width_rule is {optimizer.width_rule} and optimizer.base_hidden_size is missing: give the "
            "model.hidden_size at which the learning rate was chosen"
        )
    if optimizer.width_rule == "none" and base is not None:
        return f"optimizer.base_hidden_size is {base} and optimizer.width_rule is none: set it to mup, or leave it out"
    return ""
