"""The sections of a training configuration: each key's type, default, bound, meaning and unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mf_train.config import bounds
from mf_train.config.bounds import fraction, not_negative, positive
from mf_train.config.model import ModelConfig

OnError = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents: files (`path`: a file, folder, glob or URL) or a dataset of the hub (`hub`)."""

    path: str | None = bounds.path(None)  # text (docs/data.md: formats), or token shards: .bin with its .idx
    hub: str | None = None  # owner/name on the Hugging Face hub
    hub_config: str | None = None  # the dataset's configuration name, where it has several
    split: str = "train"  # of a hub dataset
    text_field: str = "text"  # the column or JSON key that holds the text
    weight: float = positive(1.0)  # share of the training sequences, relative to the other sources' weights


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(SourceConfig):
    """A validation set. `weight`: its share of `training.validation_sequences` and of the mean `validation_loss`."""

    name: str = ""  # in the metrics; without one, the set's number in the list, from 0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The sources of documents, and how they are ordered and read."""

    train: tuple[SourceConfig, ...] = ()  # sources of training text
    validation: tuple[ValidationConfig, ...] = ()  # sets of text that is not trained on
    seed: int = 0  # of the order of documents
    # steps whose batches are read and not trained on: numbers, and the first and last of several as 1200-1210
    skip_steps: tuple[int | str, ...] = bounds.steps(())
    logical_streams: int = positive(64)  # batches are dealt from them, and so many ranks can read
    block_documents: int = positive(64)  # neighbours that stay together when a source's blocks are shuffled
    window_blocks: int = positive(16)  # blocks of a stream among which documents are shuffled
    document_attention: bool = False  # attention inside documents only, and positions that begin anew in each
    on_error: OnError = "raise"  # what a corrupt document or a truncated file does
    workers: int = not_negative(1)  # processes that read and tokenise for a data-parallel rank; 0: a thread
    timeout_seconds: int = positive(300)  # to read a batch, retries counted; then the run ends
    # folder for text of compressed and remote files; None: $XDG_CACHE_HOME/mf_train
    cache: str | None = bounds.path(None)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A sentencepiece model or a tokenizer.json, or the folder that holds either.

    Without one, a run trains on token shards that another tokenizer made, and needs its `end_of_text_id`.
    """

    path: str = bounds.path("")  # of the file or folder; none: shards are trained on
    end_of_text_id: int | None = None  # the id that ends a document; None: the tokenizer says it


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """What a group of parameters has of its own (`mf_train.config.groups`); None: what all have."""

    learning_rate_multiplier: float | None = positive(None)  # its rate, as a multiple of learning_rate
    weight_decay: float | None = not_negative(None)  # its decay, in place of optimizer.weight_decay


@dataclass(frozen=True, kw_only=True)
class GroupsConfig:
    """The groups of parameters; each parameter is in one."""

    tables: GroupConfig = field(default_factory=GroupConfig)  # of all layers, but for what ffn_tables says
    ffn_tables: GroupConfig = field(default_factory=GroupConfig)  # of the FFN; None: what tables have
    embedding: GroupConfig = field(default_factory=GroupConfig)
    head: GroupConfig = field(default_factory=GroupConfig)
    matrices: GroupConfig = field(default_factory=GroupConfig)  # of the dense peer's layers
    attention: GroupConfig = field(
        default_factory=GroupConfig
    )  # of attention's own weights (docs/attention.md)
    norms: GroupConfig = field(default_factory=GroupConfig)  # norms and all biases; None: no decay


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. `groups`: rates and decays of their own; `width_rule`: rates that follow the model's width."""

    learning_rate: float = positive(1e-3)  # at its peak (the section schedule)
    table_learning_rate_multiplier: float = positive(1.0)  # of all tables, as in groups.tables
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    # mup: rates of tables, head and matrices times base_hidden_size / model.hidden_size (docs/training.md)
    width_rule: Literal["none", "mup"] = "none"
    base_hidden_size: int | None = positive(None)  # of the model at which learning_rate was chosen
    betas: tuple[float, float] = bounds.betas((0.9, 0.95))  # of the first moment and of the second
    eps: float = positive(1e-8)  # added to the root of the second moment
    # how first moments of tables and of the embedding are held (docs/memory.md); everything else's are in float32
    table_exp_avg: Literal["float32", "bfloat16", "int8"] = "float32"
    table_exp_avg_sq: Literal["float32", "bfloat16", "int8", "row"] = "float32"  # and second ones
    weight_decay: float = not_negative(0.1)  # of all but norms and biases, where groups do not say otherwise
    gradient_clip: float = not_negative(1.0)  # largest global L2 norm of the gradient; 0: no clipping

    @property
    def compact_moments(self) -> bool:
        """Whether some moments are held in fewer bytes than float32 has."""
        return {self.table_exp_avg, self.table_exp_avg_sq} != {"float32"}


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the steps: linear warm-up, then as `kind` says (mf_train/config/schedule.py)."""

    # after the warm-up (docs/training.md has the formulas)
    kind: Literal["cosine", "linear", "constant", "warmup_stable_decay", "inverse_sqrt"] = "cosine"
    warmup_steps: int | None = not_negative(None)  # None: 1 % of the steps
    minimum_fraction: float = fraction(0.01)  # last rate as a share of the peak, where it falls to one
    # warmup_stable_decay: the last steps, in which the rate falls, or their share of training.steps
    decay_steps: int | None = positive(None)
    decay_fraction: float = fraction(0.2)  # where decay_steps is not given
    # where a run goes on from a checkpoint whose own keys give the next step another rate (docs/training.md): refuse;
    # follow: it jumps to this schedule's; rewarm: it goes there on a straight line over warmup_steps steps
    on_change: Literal["refuse", "follow", "rewarm"] = "refuse"


def set_names(data: DataConfig) -> list[str]:
    """The names of the validation sets."""
    return [each.name or str(number) for number, each in enumerate(data.validation)]


def warmup_steps(schedule: ScheduleConfig, steps: int) -> int:
    """Steps of warm-up in a run of `steps`."""
    return max(1, round(steps / 100)) if schedule.warmup_steps is None else schedule.warmup_steps


def decay_steps(schedule: ScheduleConfig, steps: int) -> int:
    """Last steps of a run of `steps` in which a rate of warmup_stable_decay falls."""
    return round(steps * schedule.decay_fraction) if schedule.decay_steps is None else schedule.decay_steps


def schedule_problem(schedule: ScheduleConfig, steps: int) -> str:
    """An error about a schedule that goes over `steps`, beyond the bounds of its keys; empty where it fits."""
    if schedule.on_change == "rewarm" and warmup_steps(schedule, steps) == 0:
        return "schedule.on_change is rewarm and schedule.warmup_steps, over which it goes, is 0: raise it"
    if schedule.kind != "warmup_stable_decay":
        if schedule.decay_steps is None:
            return ""
        return f"schedule.decay_steps is of warmup_stable_decay and schedule.kind is {schedule.kind}: leave it out"
    warmup, decay = warmup_steps(schedule, steps), decay_steps(schedule, steps)
    if warmup + decay <= steps:
        return ""
    return (
        f"schedule has {warmup} steps of warm-up and {decay} of decay, and it goes over {steps} steps: lower "
        "schedule.warmup_steps, schedule.decay_steps or schedule.decay_fraction"
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees. Data parallelism is the number of processes divided by `tensor`."""

    tensor: int = positive(1)  # P: neighbouring processes that share every table, by column
    # what data-parallel ranks share: 1 masters and moments, 2 also gradients, 3 also parameters; 0: nothing
    zero_stage: int = bounds.zero_stage(1)
    offload: Literal["none", "optimizer"] = "none"  # optimizer: masters and moments live in host memory
    master: Literal["float32", "split"] = "float32"  # split: the bfloat16 weight and its missing 16 bits
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradients when sent; added in float32
    overlap: bool = True  # send gradients beside the backward pass, weights beside the next forward pass
    bucket_size: int = positive(40_000_000)  # numbers of gradients that are reduced at once, at least


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """What hash, lookup, norms, loss, rotation and compact AdamW are computed by (docs/kernels.md)."""

    # auto: C++ on a CPU, Triton on a GPU, torch operations where these do not run; composition: torch operations; cpu,
    # triton: as auto, and the run ends where it cannot be had; cuda: as triton, with lookups in CUDA C++ (H100, H200)
    backend: Literal["auto", "composition", "cpu", "triton", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps and ranks are profiled, into the run's folder (docs/profiling.md)."""

    steps: int = not_negative(0)  # how many, one after another; 0: none
    start: int = positive(10)  # the first of them, counted from the run's first step, which is 1
    ranks: tuple[int, ...] = (0,)  # each writes files of its own


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The run: its length, batch, arithmetic, device and folder."""

    steps: int = positive(1000)  # the last one's number
    global_batch_size: int = positive(8)  # sequences a step
    micro_batch_size: int = positive(8)  # sequences a forward pass of one data-parallel rank, at most
    precision: Literal["float32", "bfloat16"] = "float32"  # of weights and activations, not of masters
    # block: activations of a block are computed again in the backward pass, and its input alone is kept until then
    recompute: Literal["none", "block"] = "none"
    seed: int = 0  # of the initial weights
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    deterministic: bool = False  # repeat to the last bit on GPUs too; an operation that cannot ends the run
    output_dir: str = bounds.path("runs/default")  # the run's folder
    validation_interval: int = not_negative(0)  # steps between validations, also after the last; 0: none
    validation_sequences: int = not_negative(0)  # of all sets: one each, the rest by weight; 0: all text
    # tasks of lm-evaluation-harness that the model answers in training, and after the last step (docs/evaluation.md)
    evaluate_tasks: tuple[str, ...] = ()
    evaluate_interval: int = not_negative(0)  # steps between their evaluations; 0: only after the last
    evaluate_limit: int = not_negative(0)  # of each task only the first so many items; 0: all
    evaluate_include_path: str | None = bounds.path(None)  # a folder of task files, such as configs/eval
    # z of z log(Z)^2, added to a token's loss for its gradient, Z its sum of exp(logits); PaLM has 1e-4, 0: none
    z_loss: float = bounds.small(0.0)
    # updates in a row that are left out where loss or gradient norm is not finite; one more, and the run ends
    skip_nonfinite: int = not_negative(0)
    # an update is left out where loss or gradient norm is so many standard deviations, estimated by medians, above the
    # last 128 updates' (mf_train/training/bad_steps.py); 6 is usual, 0: none is
    skip_spikes: float = not_negative(0.0)
    # d of an exponential average of the weights, d average + (1 - d) weights after each update, in float32; 0: none
    average_decay: float = bounds.decay(0.0)
    collective_timeout_seconds: int = positive(600)  # a collective that waits longer ends the run
    bind_cores: bool = True  # of a rank that nobody has bound: its GPU's NUMA node, or a share
    gc_interval: int = not_negative(100)  # steps between Python's garbage collections; 0: its own
    profile: ProfileConfig = field(default_factory=ProfileConfig)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to resume from."""

    interval: int = not_negative(0)  # steps between checkpoints, and one after the last step; 0: only that
    keep: int = not_negative(2)  # newest complete checkpoints that are kept; 0: all
    keep_every: int = not_negative(0)  # checkpoints of its multiples are kept as well, for studies; 0: none
    asynchronous: bool = True  # written beside the steps, from a copy in host memory (12 bytes a parameter)
    verify: bool = True  # checksums of what a run resumes from; sizes are always checked
    # auto: the run folder's newest good one; never; or the path of a checkpoint to start from
    resume: str = bounds.path("auto")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Where Weights & Biases gets the numbers that TensorBoard gets (docs/telemetry.md)."""

    project: str = ""  # its project; none: nowhere
    entity: str | None = None  # the user or team whose project it is; None: the key's own
    mode: Literal["online", "offline"] = "online"  # offline: into the run's folder, for 'wandb sync'


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Lines, TensorBoard and reports on the tables: rank 0's output beside metrics.jsonl."""

    interval: int = positive(10)  # steps between printed lines when the output is not a terminal
    tensorboard: bool = True  # write the numbers for it into the run's folder
    wandb: WandbConfig = field(default_factory=WandbConfig)
    # steps between comparisons of the ranks' times (docs/telemetry.md); 0: none
    ranks_interval: int = not_negative(100)
    telemetry_interval: int = not_negative(0)  # steps between reports on the tables (rows read, ...); 0: none
    # warn about a table (docs/telemetry.md) whose rows read are below this share of what uniform codes read; 0: never
    alarm_rows_read: float = fraction(0.02)
    alarm_entropy: float = fraction(0.02)  # and where its codes' entropy is below this share of uniform ones'
    # and where its most-read row is this far from the uniform share (0) towards all reads (1); 1: never
    alarm_largest_share: float = fraction(0.99)


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """The steps of the run from `start` on, to the next phase or the end, with other values of some keys.

    Sections as at the top level, of the keys that change (mf_train/config/phases.py says which may).
    """

    name: str = ""  # in the metrics
    start: int = positive(1)  # its first step
    model: dict[str, Any] = field(default_factory=dict)  # sequence_length
    data: dict[str, Any] = field(default_factory=dict)  # all but skip_steps
    optimizer: dict[str, Any] = field(default_factory=dict)  # all keys
    # all but on_change; it counts from the phase's first step, and what is not given has its default
    schedule: dict[str, Any] = field(default_factory=dict)
    # global_batch_size, micro_batch_size, recompute, validation_interval and _sequences, z_loss, skip_*
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole training configuration: what a YAML file in configs/ describes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    # ascending by `start`; before the first of them the sections hold as they are
    phases: tuple[PhaseConfig, ...] = ()
