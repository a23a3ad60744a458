"""The rates and decays of groups of parameters, and the width rule's claim on one memory layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mf_train.config.groups import GROUPS, group_of, group_rules, groups_of
from mf_train.config.loading import parse_config
from mf_train.config.model import LEARNED_ATTENTION
from mf_train.model import MemoryFormer, ModelConfig
from mf_train.model.memory import Lookup


def rules(hidden_size: int, **optimizer: Any) -> dict[str, tuple[float, float]]:
    config = parse_config({"model": {"hidden_size": hidden_size}, "optimizer": optimizer}, "test")
    return {group: tuple(rule) for group, rule in group_rules(config.optimizer, hidden_size).items()}


def test_what_each_group_has() -> None:
    plain = dict.fromkeys(GROUPS, (1.0, 0.1)) | {"norms": (1.0, 0.0)}
    assert rules(512) == plain
    both = {"tables": (2.0, 0.1), "ffn_tables": (2.0, 0.1)}
    assert rules(512, table_learning_rate_multiplier=2) == plain | both
    assert rules(512, groups={"tables": {"learning_rate_multiplier": 2}}) == plain | both
    groups = {
        "tables": {"learning_rate_multiplier": 3, "weight_decay": 0},
        "ffn_tables": {"learning_rate_multiplier": 5},
        "head": {"weight_decay": 0.5},
        "norms": {"weight_decay": 0.25},
    }
    own = {"tables": (3.0, 0.0), "ffn_tables": (5.0, 0.0), "head": (1.0, 0.5), "norms": (1.0, 0.25)}
    assert rules(512, groups=groups) == plain | own


def test_the_width_rule_divides_rates_and_keeps_rate_times_decay() -> None:
    groups = {"tables": {"learning_rate_multiplier": 3}}
    before = rules(512, groups=groups)
    after = rules(512, groups=groups, width_rule="mup", base_hidden_size=128)
    for group, (multiplier, decay) in before.items():
        share = 1 if group in ("embedding", "attention", "norms") else 4
        assert after[group] == (multiplier / share, decay * share), group
    assert rules(512, width_rule="mup", base_hidden_size=512) == rules(512)


def test_every_parameter_has_its_group() -> None:
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "bits": 4, "vocab_size": 32}
    expected = {
        "memoryformer": {"query": "tables", "key": "tables", "value": "tables"}
        | {"up": "ffn_tables", "down": "ffn_tables"},
        "dense": dict.fromkeys(("query", "key", "value", "output", "up", "down"), "matrices"),
    }
    kinds = {kind: {"kind": kind} for kind in expected}
    kinds["hybrid"] = {"qkv": "low_rank", "output": "memory", "rank": 3}
    expected["hybrid"] = expected["memoryformer"] | dict.fromkeys(("reduce", "expand"), "matrices")
    expected["hybrid"]["output"] = "tables"
    kinds["rotated"] = {"rotation": True}
    turned = dict.fromkeys(("rotate_attention", "rotate_ffn", "rotate_inner"), "matrices")
    expected["rotated"] = expected["memoryformer"] | turned
    kinds["products"] = {"ffn": "product_key", "product_keys": 20}
    expected["products"] = expected["memoryformer"] | dict.fromkeys(("select", "queries"), "matrices")
    expected["products"]["values"] = "ffn_tables"
    kinds |= {kind: {"attention": kind} for kind in LEARNED_ATTENTION}
    expected |= dict.fromkeys(LEARNED_ATTENTION, expected["memoryformer"])
    for kind, layers in expected.items():
        config = ModelConfig(**kinds[kind], **sizes)
        found = set()
        for name, parameter in MemoryFormer(config).named_parameters():
            module, last = name.split(".")[-2:]
            small = "norm" in module or last in ("bias", "pack_log_temperature", "unpack_log_temperature")
            group = "norms" if small else layers.get(module, module)
            assert group_of(name, parameter.dim()) == group, name
            found.add(group)
        assert found == set(groups_of(config))


def output_change(num_tables: int, multiplier: float) -> float:
    """How far one update of AdamW moves what a memory layer gives to a token, with a rate of 1e-3."""
    generator = torch.Generator().manual_seed(num_tables)
    layer = Lookup(num_tables, 4, 64)
    with torch.no_grad():
        layer.tables.normal_(0, 0.02, generator=generator)
        layer.bias.zero_()
    codes = torch.randint(16, (1, num_tables), generator=generator, dtype=torch.uint8)
    weights = torch.rand(1, num_tables, generator=generator)
    before = layer(codes, weights)
    optimizer = torch.optim.AdamW([layer.tables], lr=1e-3 * multiplier, weight_decay=0.0)
    (before * torch.randn(64, generator=generator)).sum().backward()
    optimizer.step()
    return (layer(codes, weights) - before).abs().mean().item()


def test_an_update_moves_an_output_as_far_at_every_width() -> None:
    """A token's K rows are moved in one direction, so without the rule twice as far with twice as many tables."""
    widths = (512, 1024, 2048)  # D, of tables of 4 bits
    with_rule = [
        output_change(width // 4, rules(width, width_rule="mup", base_hidden_size=512)["tables"][0])
        for width in widths
    ]
    assert with_rule == pytest.approx([with_rule[0]] * 3, rel=0.15)
    assert [output_change(width // 4, 1.0) / with_rule[0] for width in widths] == pytest.approx(
        [1, 2, 4], rel=0.15
    )
