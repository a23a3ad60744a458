"""The arguments of `memoryformer plan`, and what they call."""

import argparse
import json
from pathlib import Path
from typing import Any

from mf_train.commands import add_command, add_config, print_lines, refuse_with


def add_plan(commands: Any) -> None:
    """Add the command to the command line's parser."""
    parser = add_command(
        commands,
        "plan",
        "memory, step time, cost and launch line of a run, from its configuration alone",
        "plan configs/base.yaml --nodes 4 --gpus-per-node 8 --device h100",
        _plan,
    )
    add_config(parser)
    parser.add_argument(
        "--nodes", type=_positive, default=1, metavar="N", help="number of nodes (default: 1)"
    )
    parser.add_argument(
        "--gpus-per-node", type=_positive, default=8, metavar="G", help="processes on each node (default: 8)"
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="h100 (the default), h200, b200, a100, mi300x, cpu or another of devices.yaml, or a YAML file of rates",
    )
    parser.add_argument(
        "--measured", type=Path, metavar="RUN", help="a run's folder: show what it measured beside the plan"
    )
    parser.add_argument(
        "--cost-per-hour", type=_price, metavar="X", help="cost of one device-hour, in any currency"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the scaling curves and the learning rate"
    )
    parser.add_argument(
        "--largest",
        metavar="GB,...",
        help="instead: the largest size that GPUs of so much memory can train, such as 24,80,h200",
    )
    parser.add_argument(
        "--rows",
        type=_positive,
        default=10,
        metavar="K",
        help="number of layouts that are shown (default: 10)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: it must be a whole number, 1 or more")
    return int(text)


def _price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: it must be a number, 0 or more")
    return value


def _plan(given: argparse.Namespace) -> int:
    from mf_train.config.loading import load_config
    from mf_train.errors import UserError
    from mf_train.planning import report
    from mf_train.planning.devices import find_device
    from mf_train.planning.measured import read_measured
    from mf_train.planning.plan import make_plan
    from mf_train.planning.scaling import draw_scaling, scaling

    if given.plot is not None and given.plot.suffix != ".png":
        raise UserError(f"--plot {given.plot}: the picture is a PNG; name a file that ends in .png")
    if given.largest is not None:
        return _largest(given)
    device = find_device(given.device or "h100")
    config = load_config(given.config, given.overrides)
    nodes, per_node = given.nodes, given.gpus_per_node
    plan = make_plan(given.config, given.overrides, config, nodes, per_node, device)
    measured = read_measured(given.measured, plan.config) if given.measured else None
    curves = scaling(plan.base, nodes, per_node, device)
    if given.plot is not None:
        title = f"{given.config} on {device.name}, nodes of {per_node}"
        _write(given.plot, draw_scaling(plan.base, config, title, curves))
    if given.json:
        return print_lines([json.dumps(report.plan_tree(plan, curves, measured, given.cost_per_hour))])
    return print_lines(report.plan_lines(plan, curves, measured, given.cost_per_hour, given.rows))


def _largest(given: argparse.Namespace) -> int:
    from mf_train.config.loading import load_config
    from mf_train.planning.largest import find_largest, largest_lines, largest_tree, parse_memories

    refuse_with(given, "--largest", device=None, measured=None, cost_per_hour=None, plot=None, rows=10)
    memories = parse_memories(given.largest)
    config = load_config(given.config, given.overrides)
    found = find_largest(config, given.nodes, given.gpus_per_node, memories)
    if given.json:
        return print_lines([json.dumps(largest_tree(found, given.gpus_per_node))])
    return print_lines(largest_lines(given.config, given.gpus_per_node, found))


def _write(path: Path, picture: bytes) -> None:
    from mf_train.errors import UserError
    from mf_train.files import write_whole

    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}: make it first")
    write_whole(path, picture)
