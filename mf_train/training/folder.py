"""The run's folder: whether it may be used, what to resume from, and the configuration recorded in it."""

from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path

from mf_train.checkpoint.layout import (
    CONFIG,
    TOKENIZER,
    list_checkpoints,
    resolve_checkpoint,
)
from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import Config, ModelConfig
from mf_train.config.loading import config_to_tree, load_config
from mf_train.config.schedule import learning_rate
from mf_train.config.yaml_text import yaml_text
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from mf_train.files import write_whole
from mf_train.run_folder import CHECKPOINTS
from mf_train.run_folder import CONFIG as RUN_CONFIG
from mf_train.versions import package_versions


def check_folder(config: Config) -> None:
    """Raises UserError where the folder holds another model's run, or a run that would be overwritten."""
    folder = Path(config.training.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another training.output_dir")
    recorded = folder / RUN_CONFIG
    if recorded.is_file():
        _check_same_model(config, recorded)
    existing = list_checkpoints(folder / CHECKPOINTS)
    if config.checkpoint.resume == "never" and existing:
        raise UserError(
            f"{folder}: holds checkpoints up to {existing[-1].name} and checkpoint.resume is never; choose "
            "another training.output_dir, delete the folder, or set checkpoint.resume=auto"
        )
    if config.checkpoint.resume not in ("auto", "never") and not existing:
        resolve_checkpoint(Path(config.checkpoint.resume))


def resolved_yaml(config: Config) -> str:
    """The whole configuration as YAML, with the versions of the packages that matter."""
    tree = config_to_tree(config) | {"versions": package_versions()}
    return yaml_text(tree)


def record_config(config: Config) -> None:
    """Write config.yaml into the run's folder, creating it. Raises OSError."""
    folder = Path(config.training.output_dir)
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    write_whole(folder / RUN_CONFIG, resolved_yaml(config).encode())


def check_same_run(config: Config, tokenizer: Tokenizer, reader: CheckpointReader) -> None:
    """Raises UserError where a checkpoint is of another model or tokenizer; its sequences may be of another length."""
    before = load_config(reader.checkpoint / CONFIG).model
    if changed := _difference(replace(before, sequence_length=config.model.sequence_length), config.model):
        raise UserError(
            f"{reader.checkpoint}: of another model ({changed}); choose another checkpoint.resume"
        )
    if TOKENIZER in reader.manifest.files and tokenizer.model_bytes:
        if reader.read_file(TOKENIZER) != tokenizer.model_bytes:
            raise UserError(
                f"{reader.checkpoint}: of another tokenizer; set tokenizer.path={reader.checkpoint / TOKENIZER}, or "
                "choose another checkpoint.resume"
            )


def describe_changes(config: Config, checkpoint: Path, step: int) -> list[str]:
    """A line for each thing that a run does otherwise than the checkpoint's own run, after whose `step` it resumes:
    how numbers are held, and the learning rate of the next step.
    """
    before = load_config(checkpoint / CONFIG)
    held = []
    for key in ("optimizer.table_exp_avg", "optimizer.table_exp_avg_sq", "parallel.master"):
        there, here = (attrgetter(key)(each) for each in (before, config))
        if there != here:
            held.append(f"{key} {there} to {here}")
    lines = [f"converted what the checkpoint holds: {', '.join(held)}"] if held else []
    old, new = (
        learning_rate(step + 1, each.training.steps, each.optimizer.learning_rate, each.schedule)
        for each in (before, config)
    )
    if new != old:
        lines.append(
            f"warning: the learning rate of step {step + 1} is {new:.4g}; with the checkpoint's "
            f"optimizer.learning_rate, schedule and training.steps it is {old:.4g}"
        )
    return lines


def _check_same_model(config: Config, recorded: Path) -> None:
    if changed := _difference(load_config(recorded).model, config.model):
        raise UserError(
            f"{recorded.parent}: holds a run of another model ({changed}); choose another training.output_dir or "
            "delete the folder"
        )


def _difference(there: ModelConfig, here: ModelConfig) -> str:
    """The first key of the model section that differs, with both values; empty if none does."""
    for key, value in asdict(here).items():
        if (before := asdict(there)[key]) != value:
            return f"model.{key} is {before} there and {value} here"
    return ""
