"""The run's folder: whether it may be used, what to resume from, and the configuration recorded in it."""

from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path

from mf_train.checkpoint.layout import (
    AVERAGE,
    CONFIG,
    list_checkpoints,
    resolve_checkpoint,
)
from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import Config, ModelConfig
from mf_train.config.groups import group_rules, groups_of
from mf_train.config.loading import config_to_tree, load_config
from mf_train.config.phases import Phase, changed_keys, phase_at
from mf_train.config.schedule import Rewarm, rate_of, rewarm_end
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
    """Raises UserError where a checkpoint is of another model or tokenizer, or of a run whose phases were others up to
    there; its sequences may be of another length.
    """
    before, step = load_config(reader.checkpoint / CONFIG), reader.manifest.step
    model = replace(before.model, sequence_length=config.model.sequence_length)
    if changed := _difference(model, config.model):
        raise UserError(
            f"{reader.checkpoint}: of another model ({changed}); choose another checkpoint.resume"
        )
    there, here = ([phase.start for phase in of.phases if phase.start <= step] for of in (before, config))
    if there != here:
        raise UserError(
            f"{reader.checkpoint}: up to its step {step}, phases began at {there} there and at {here} in this "
            f"configuration: leave `phases` up to there as they were, start new ones at {step + 1} or later, or choose "
            "another checkpoint.resume"
        )
    name = next((name for name in reader.read_tokenizer()), None)
    if name and tokenizer.model_bytes and reader.read_file(name) != tokenizer.model_bytes:
        raise UserError(
            f"{reader.checkpoint}: of another tokenizer; set tokenizer.path={reader.checkpoint / name}, or "
            "choose another checkpoint.resume"
        )


def find_rewarm(config: Config, reader: CheckpointReader) -> Rewarm | None:
    """What the rates of a run are that goes on from a checkpoint: `rate_of` with this.

    Raises UserError where the next step's rate is not the one that the checkpoint's own configuration gives it, and
    `schedule.on_change` does not say what to do.
    """
    step, held = reader.manifest.step, _held_rewarm(reader)
    if not 0 < step < config.training.steps:
        return held
    if (rates := _next_rates(config, reader)) is None:
        return None
    old, new = rates
    if old == new:
        return held
    if config.schedule.on_change == "refuse":
        raise UserError(
            f"{reader.checkpoint}: the learning rate of step {step + 1} would be {new:.6g}, and it is {old:.6g} by the "
            "checkpoint's optimizer.learning_rate, schedule and training.steps: keep these, or set schedule.on_change "
            "to follow (it jumps) or rewarm (it goes there over schedule.warmup_steps)"
        )
    if config.schedule.on_change == "follow":
        return None
    return Rewarm(step, rate_of(_trained_phase(reader), step, held))


def _held_rewarm(reader: CheckpointReader) -> Rewarm | None:
    held = reader.state().get("rewarm")
    return Rewarm(*held) if held else None


def _trained_phase(reader: CheckpointReader) -> Phase:
    """The phase of a checkpoint's last step, by its own configuration."""
    return phase_at(load_config(reader.checkpoint / CONFIG), reader.manifest.step)


def _next_rates(config: Config, reader: CheckpointReader) -> tuple[float, float] | None:
    """The next step's rate as the phase would go on in the checkpoint's run, and in this one.

    None where a phase with a schedule of its own begins with that step.
    """
    step, held = reader.manifest.step, _held_rewarm(reader)
    if phase_at(config, step + 1).schedule_steps.start == step + 1:
        return None
    there, here = _trained_phase(reader), phase_at(config, step)
    return rate_of(there, step + 1, held), rate_of(here, step + 1, held)


def describe_phase(config: Config, checkpoint: Path | None) -> list[str]:
    """A line on the phase in which a run goes on from a checkpoint, and, where it begins there, on what changes.

    No line where the run has no phases.
    """
    if not config.phases:
        return []
    reader = None if checkpoint is None else CheckpointReader(checkpoint)
    step = 0 if reader is None else reader.manifest.step
    phase = phase_at(config, step + 1)
    line = f"phase {phase.name!r}: steps {phase.first} to {phase.last}"
    if reader is None or step == 0 or step + 1 != phase.first:
        return [line]
    before, rewarm = _trained_phase(reader), find_rewarm(config, reader)
    rates = rate_of(before, step, _held_rewarm(reader)), rate_of(phase, step + 1, rewarm)
    batches = [each.config.training.global_batch_size for each in (before, phase)]
    lengths = [each.config.model.sequence_length for each in (before, phase)]
    changed = ", ".join(changed_keys(before.config, phase.config)) or "nothing"
    return [
        f"{line}; learning rate {rates[0]:.4g} to {rates[1]:.4g}, sequences a step {batches[0]} to {batches[1]}, "
        f"tokens a sequence {lengths[0]} to {lengths[1]}; changed: {changed}"
    ]


def describe_changes(config: Config, checkpoint: Path) -> list[str]:
    """A line for each thing that a run does otherwise than the run of the checkpoint that it goes on from: how numbers
    are held, the average of the weights, and learning rates.
    """
    reader = CheckpointReader(checkpoint)
    step, before = reader.manifest.step, _trained_phase(reader).config
    goes_on, after = phase_at(config, step), phase_at(config, step + 1).config
    held = []
    for key in ("optimizer.table_exp_avg", "optimizer.table_exp_avg_sq", "parallel.master"):
        there, here = (attrgetter(key)(each) for each in (before, after))
        if there != here:
            held.append(f"{key} {there} to {here}")
    lines = [f"converted what the checkpoint holds: {', '.join(held)}"] if held else []
    held_average, average = AVERAGE in reader.manifest.kinds, bool(config.training.average_decay)
    if average and not held_average:
        lines.append(f"the average of the weights begins at those of step {step}: the checkpoint holds none")
    if held_average and not average:
        lines.append("the checkpoint's average of the weights is dropped: training.average_decay is 0")
    old, new = _next_rates(config, reader) or (0.0, 0.0)
    if step and old != new:
        if (rewarm := find_rewarm(config, reader)) is None:
            how = f"jumps from {old:.4g} to {new:.4g} at step {step + 1}"
        else:
            end = rewarm_end(goes_on, rewarm)
            how = f"goes from {rewarm.rate:.4g} at step {step} to {rate_of(goes_on, end):.4g} at step {end}"
        lines.append(
            f"the learning rate {how}, since it is not the checkpoint's (schedule.on_change: "
            f"{config.schedule.on_change})"
        )
    there, here = (group_rules(each.optimizer, each.model.hidden_size) for each in (before, goes_on.config))
    jumps = [
        f"{group} from {there[group].multiplier:g} to {here[group].multiplier:g}"
        for group in groups_of(config.model)
        if there[group].multiplier != here[group].multiplier
    ]
    if step and jumps:
        lines.append(f"warning: learning rate multipliers jump: {', '.join(jumps)}")
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
