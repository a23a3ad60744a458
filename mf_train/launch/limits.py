"""Whether a run can work on the nodes that are asked for: its degrees, memory and notice. Nothing is written."""

import math

from mf_train.config import Config
from mf_train.errors import UserError
from mf_train.launch.options import LONGEST_NOTICE, JobOptions, check_options, time_seconds
from mf_train.model.counts import count_parameters
from mf_train.text import human_bytes

_NOTICE_SECONDS, _NOTICE_SECONDS_PER_GB = 120, 2.0


def check_job(config: Config, options: JobOptions, node_memory: float | None = None) -> list[int]:
    """The numbers of nodes, ascending, on which the configuration can train: one, or several of an elastic job.

    `node_memory` is what a node without GPUs has, in bytes, where it is known. Raises UserError for options that sbatch
    or the job could not use, degrees that do not divide, and a model that cannot fit.
    """
    check_options(options)
    per_node, tensor = options.per_node, config.parallel.tensor
    if config.checkpoint.resume == "never":
        raise UserError(
            "checkpoint.resume is never: the job would end when it is requeued and finds its own checkpoints; "
            "set checkpoint.resume=auto (a new training.output_dir starts anew)"
        )
    if config.training.device == "cuda" and options.gpus_per_node is None:
        raise UserError("training.device is cuda: give --gpus-per-node instead of --tasks-per-node")
    if per_node % tensor:
        raise UserError(
            f"parallel.tensor {tensor} does not divide the {per_node} processes of a node: a tensor-parallel group "
            "stays inside a node; change parallel.tensor, --gpus-per-node or --tasks-per-node"
        )
    usable = _usable(config, options, node_memory)
    notice = notice_seconds(config, options)
    limit = time_seconds(options.time) if options.time else math.inf
    if notice >= limit:
        raise UserError(
            f"the notice of {notice} s before the time limit is not less than --time {options.time}: give a longer "
            "--time, or fewer seconds with --notice"
        )
    return usable


def left_out(options: JobOptions, node_counts: list[int]) -> list[int]:
    """Numbers of nodes inside an elastic job's range that the configuration cannot use."""
    fewest, most = options.node_range
    return [count for count in range(fewest, most + 1) if count not in node_counts]


def warnings(config: Config, options: JobOptions) -> list[str]:
    """Warnings about settings that are allowed and seldom meant."""
    found = []
    if not config.checkpoint.interval:
        found.append(
            "checkpoint.interval is 0: a node that fails loses every step of this start; set an interval in steps"
        )
    if options.time is None:
        found.append("no --time: the partition's default limit holds, and short jobs start sooner")
    if config.training.device == "cpu" and options.gpus_per_node is not None:
        found.append("training.device is cpu: the GPUs that --gpus-per-node asks for are not used")
    return found


def notice_seconds(config: Config, options: JobOptions) -> int:
    """Seconds of notice: as asked, else 120 and 2 for each GB of a checkpoint, in whole minutes."""
    if options.notice is not None:
        return options.notice
    seconds = _NOTICE_SECONDS + _NOTICE_SECONDS_PER_GB * checkpoint_bytes(config) / 1e9
    return min(60 * round(seconds / 60), LONGEST_NOTICE)


def checkpoint_bytes(config: Config) -> int:
    """Size of a checkpoint."""
    return count_parameters(config.model).checkpoint_bytes


def _usable(config: Config, options: JobOptions, node_memory: float | None) -> list[int]:
    """Raises UserError where no number of nodes is; the reason is that of the largest."""
    from mf_train.parallel.degrees import check_degrees

    usable, reason = [], ""
    fewest, most = options.node_range
    for nodes in range(fewest, most + 1):
        processes = nodes * options.per_node
        try:
            check_degrees(config, processes)
            _check_memory(config, options, processes, node_memory)
        except UserError as error:
            reason = f"{_size(nodes, options)}: {error}"
        else:
            usable.append(nodes)
    if not usable:
        raise UserError(
            reason if fewest == most else f"--elastic {fewest}:{most}: no number of nodes works; {reason}"
        )
    return usable


def memory_warnings(config: Config, options: JobOptions, nodes: int, node_memory: float | None) -> list[str]:
    """A warning where the planner predicts more memory on so many nodes than there is: a model, no measurement."""
    from mf_train.planning.device_memory import estimate_memory

    there, place, kind = _memory_there(options, node_memory)
    processes = nodes * options.per_node
    if there is None or (peak := estimate_memory(config, processes, kind).peak) <= there:
        return []
    return [
        f"may not fit: a process is predicted to need {human_bytes(peak)} at its peak, and {place}: "
        f"{_advice(options, nodes)}"
    ]


def _check_memory(config: Config, options: JobOptions, processes: int, node_memory: float | None) -> None:
    """Raises UserError where AdamW's update alone has no room: that is certain, activations are a prediction."""
    from mf_train.planning.device_memory import estimate_memory

    there, place, kind = _memory_there(options, node_memory)
    states = estimate_memory(config, processes, kind).peaks["update"]
    if there is not None and states > there:
        parallel = config.parallel
        raise UserError(
            f"does not fit: {_parameters(config) / 1e9:.3g} billion parameters need {human_bytes(states)} a process "
            f"for weights, gradients and AdamW's moments (parallel.tensor {parallel.tensor}, parallel.zero_stage "
            f"{parallel.zero_stage}, data-parallel degree {processes // parallel.tensor}), and {place}: "
            f"{_advice(options, processes // options.per_node)}"
        )


def _memory_there(options: JobOptions, node_memory: float | None) -> tuple[float | None, str, str]:
    """Bytes for one process where they are known, in words, and the device's kind."""
    if options.gpus_per_node is not None:
        return options.gpu_memory * 1e9, f"a GPU has {options.gpu_memory:g} GB (--gpu-memory)", "cuda"
    if node_memory is None:
        return None, "", "cpu"
    place = f"a node of the partition has {human_bytes(node_memory)} for {options.per_node}"
    return node_memory / options.per_node, place, "cpu"


def _advice(options: JobOptions, nodes: int) -> str:
    device = "cpu" if options.gpus_per_node is None else "h100"
    command = f"memoryformer plan CONFIG --nodes {nodes} --gpus-per-node {options.per_node} --device {device}"
    return f"'{command}' shows what fits"


def _parameters(config: Config) -> int:
    return count_parameters(config.model).total


def _size(nodes: int, options: JobOptions) -> str:
    what = "GPUs" if options.gpus_per_node is not None else "tasks"
    return f"{nodes} node{'s' if nodes > 1 else ''} x {options.per_node} {what}"
