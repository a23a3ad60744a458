"""Every shipped configuration loads, fits its processes and builds; the paper's follow its recipe."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
import yaml

from mf_train.config.loading import config_to_tree, load_config, parse_config
from mf_train.config.schedule import learning_rate
from mf_train.data.open_tokenizer import open_tokenizer
from mf_train.model import MemoryFormer
from mf_train.model.counts import count_parameters
from mf_train.parallel.degrees import check_degrees

FOLDER = Path(__file__).resolve().parents[1] / "configs"
STUDIES = sorted(FOLDER.glob("studies/*.yaml"))
TASKS = set(FOLDER.glob("eval/**/*.yaml"))  # lm-eval's
FILES = sorted(set(FOLDER.glob("**/*.yaml")) - set(STUDIES) - TASKS)
# The paper's models: blocks, hidden size, heads, tables; table parameters in billions; Pythia's peak learning rate.
PAPER = {
    "tiny": (6, 512, 8, 64, 0.415, 1e-3),
    "small": (12, 768, 12, 96, 1.868, 6e-4),
    "base": (24, 1024, 16, 128, 6.644, 3e-4),
}
PYTHIA_BLOCK_PARAMETERS = {"tiny": 18.9e6, "small": 85.1e6, "base": 302.3e6}  # without embedding and head


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_loads_comes_back_and_builds(path: Path) -> None:
    config = load_config(path)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config_to_tree(config))), "dump") == config
    with torch.device("meta"):
        model = MemoryFormer(config.model)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config.model).total


def test_documented_commands_are_accepted() -> None:
    """Their overrides load, and those for another tokenizer's shards leave no text that would need one."""
    pages = [FOLDER.parent / "README.md", *(FOLDER.parent / "docs").glob("*.md")]
    text = "".join(page.read_text() for page in pages).replace("\\\n", " ")
    commands = [
        shlex.split(line) for line in text.splitlines() if line.startswith("    memoryformer train configs/")
    ]
    assert len(commands) >= 2
    for _, _, path, *overrides in commands:
        config = load_config(FOLDER.parent / path, overrides)
        assert (config.tokenizer.end_of_text_id is None) == bool(config.tokenizer.path)
        if config.tokenizer.end_of_text_id is not None:
            sources = [*config.data.train, *config.data.validation]
            assert not any(source.hub or "." in str(source.path) for source in sources)  # prefixes of shards
            assert open_tokenizer(config.tokenizer, config.model.vocab_size).end_of_text_id == 0


def test_all_the_named_files_are_there() -> None:
    names = {path.stem for path in FILES}
    assert names >= {"quickstart", *PAPER, *(f"dense-{name}" for name in PAPER)}


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("name", [*PAPER, *(f"dense-{name}" for name in PAPER)])
def test_the_paper_s_files_fit_nodes_of_8_gpus(name: str, nodes: int) -> None:
    check_degrees(load_config(FOLDER / f"{name}.yaml"), 8 * nodes)


@pytest.mark.parametrize("name", PAPER)
def test_the_recipe_is_the_paper_s(name: str) -> None:
    config, dense = load_config(FOLDER / f"{name}.yaml"), load_config(FOLDER / f"dense-{name}.yaml")
    layers, hidden, heads, tables, billions, pythia_rate = PAPER[name]
    for each in (config, dense):
        model, optimizer, training = each.model, each.optimizer, each.training
        assert (model.num_layers, model.hidden_size, model.num_heads) == (layers, hidden, heads)
        assert (model.vocab_size, model.sequence_length, model.rotary_fraction) == (50304, 2048, 0.25)
        assert model.norm == model.ffn_inner_norm == "layernorm"
        assert (optimizer.betas, optimizer.eps) == ((0.9, 0.95), 1e-8)
        assert (optimizer.weight_decay, optimizer.gradient_clip) == (0.1, 1.0)
        assert optimizer.table_learning_rate_multiplier == 1.0
        assert (training.steps, training.global_batch_size) == (143000, 1024)
        assert training.precision == "bfloat16"
        peak = optimizer.learning_rate
        rates = [learning_rate(step, 143000, peak, each.schedule) for step in range(1, 143001)]
        assert max(rates) == rates[1429] == peak and rates[0] == pytest.approx(peak / 1430)
        assert rates[-1] == min(rates[1429:]) == pytest.approx(0.01 * peak)
    assert (config.model.kind, dense.model.kind) == ("memoryformer", "dense")
    assert (config.model.bits, config.model.expand_bits, config.model.num_tables) == (8, 2, tables)
    assert (config.model.score, config.model.temperature) == ("probability", 1.0)
    assert config.optimizer.learning_rate == pytest.approx(3 * pythia_rate)
    assert dense.optimizer.learning_rate == pythia_rate
    assert dense.parallel.tensor == 1
    assert count_parameters(config.model).tables / 1e9 == pytest.approx(billions, abs=6e-4)
    dense_counts = count_parameters(dense.model)
    blocks = dense_counts.total - dense_counts.embedding - dense_counts.head
    assert blocks == pytest.approx(PYTHIA_BLOCK_PARAMETERS[name], rel=0.002)


@pytest.mark.parametrize("name", PAPER)
def test_a_micro_batch_and_the_optimizer_fit_a_gpu(name: str) -> None:
    """The arithmetic of the files' comments: 18 bytes a parameter and the logits' peak, before ZeRO, in 80 GB."""
    for file in (name, f"dense-{name}"):
        config = load_config(FOLDER / f"{file}.yaml")
        model, tensor = config.model, config.parallel.tensor
        states = 18 * count_parameters(model).total / tensor
        tokens = config.training.micro_batch_size * model.sequence_length
        logits = 14 * tokens * model.vocab_size / tensor
        assert states + logits < 60e9


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    from mf_train.study.cells import make_grid
    from mf_train.study.study import load_study

    grid = make_grid(load_study(path))
    assert grid.cells and not [one for one in grid.left_out if "the same run" not in one.reason]


@pytest.mark.parametrize("size", ["paper", "small"])
def test_the_studies_of_the_paper_s_tables_vary_what_the_tables_do(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FOLDER.parent)
    from mf_train.study.cells import make_grid
    from mf_train.study.study import load_study

    cells = {}
    for number in (1, 3, 4, 5, 6):
        name = f"paper-table{number}" if size == "paper" else f"table{number}-small"
        cells[number] = make_grid(load_study(FOLDER / "studies" / f"{name}.yaml")).cells
    models = {number: [cell.config.model for cell in of] for number, of in cells.items()}
    assert {model.bits for model in models[3]} == {4, 8, 10}
    for hidden in {model.hidden_size for model in models[3]}:  # each size has more than one number of bits
        assert len({model.bits for model in models[3] if model.hidden_size == hidden}) > 1
    rates = {cell.config.optimizer.learning_rate for cell in cells[4]}
    assert rates >= {1e-3, 2e-3, 3e-3, 4e-3}
    assert {model.expand_bits for model in models[5]} == {0, 1, 2, 3}
    assert {model.ffn_activation for model in models[6]} == {"none", "gelu", "relu"}
    assert {model.ffn_inner_norm for model in models[6]} == {"layernorm", "rmsnorm"}
    if size == "small":
        assert all(len({cell.config.training.seed for cell in of}) > 1 for of in cells.values())
    ours = [cell.cost for cell in cells[1] if cell.config.model.kind == "memoryformer"]
    peers = [cell.cost for cell in cells[1] if cell.config.model.kind == "dense"]
    tokens, flops = ours[0].tokens, ours[0].flops
    assert {cost.tokens for cost in ours} == {tokens}
    assert any(cost.tokens == tokens for cost in peers)
    assert all(cost.tokens == tokens or cost.flops == pytest.approx(flops, rel=0.005) for cost in peers)
    assert any(cost.tokens < tokens for cost in peers)
