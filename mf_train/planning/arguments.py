"""The arguments of `memoryformer plan`, and what they call."""

import argparse
import json
from pathlib import Path
from typing import Any

from mf_train.commands import add_command


def add_plan(commands: Any) -> None:
    """Add the command to the command line's parser."""
    parser = add_command(
        commands,
        "plan",
        "memory, step time, cost and launch line of a run, from its configuration alone",
        "plan configs/base.yaml --nodes 4 --gpus-per-node 8 --device h100",
        _plan,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/base.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace the file's settings"
    )
    parser.add_argument("--nodes", type=_positive, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--gpus-per-node", type=_positive, default=8, metavar="G", help="processes a node (8)"
    )
    parser.add_argument(
        "--device",
        default="h100",
        metavar="NAME",
        help="h100, h200, b200, a100, l40s, cpu or another of devices.yaml, or a YAML file of measured rates (h100)",
    )
    parser.add_argument(
        "--measured", type=Path, metavar="RUN", help="a run's folder: show what it measured beside the plan"
    )
    parser.add_argument("--cost-per-hour", type=_price, metavar="X", help="of one device, in any currency")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the scaling curves")
    parser.add_argument("--rows", type=_positive, default=10, metavar="K", help="layouts that are shown (10)")
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
    from mf_train.planning.plan import choose, launch_line, make_layout, search, stages
    from mf_train.planning.scaling import draw_scaling, scaling

    if given.plot is not None and given.plot.suffix != ".png":
        raise UserError(f"--plot {given.plot}: the picture is a PNG; name a file that ends in .png")
    device = find_device(given.device)
    config = load_config(given.config, given.overrides)
    nodes, per_node, price = given.nodes, given.gpus_per_node, given.cost_per_hour
    measured = read_measured(given.measured, config) if given.measured else None
    try:
        asked, refusal = make_layout(config, nodes, per_node, device), None
    except UserError as error:
        asked, refusal = None, str(error)
    layouts = search(config, nodes, per_node, device)
    if not layouts:
        raise UserError(f"no layout of {nodes} x {per_node} processes divides; as configured: {refusal}")
    best = choose(layouts)
    line = launch_line(given.config, given.overrides, config, best, device) if best else None
    base = (best or layouts[0]).config if asked is None else config
    curves = scaling(base, nodes, per_node, device)
    if given.plot is not None:
        _write(
            given.plot, draw_scaling(base, f"{given.config} on {device.name}, nodes of {per_node}", curves)
        )
    if given.json:
        tree = {
            "device": device.name,
            "measured_rates": device.measured,
            "nodes": nodes,
            "gpus_per_node": per_node,
            "model": report.model_tree(config),
            "configured": asked.to_tree() if asked else {"refused": refusal},
            "measured": measured.to_tree() if measured else None,
            "best": best.to_tree() if best else None,
            "launch": line,
            "layouts": [layout.to_tree() for layout in layouts],
            "scaling": curves,
        }
        if price is not None:
            for layout in (one for one in (tree["configured"], tree["best"]) if one and "days" in one):
                layout["cost"] = layout["device_hours"] * price
        print(json.dumps(tree))
        return 0
    lines = [f"{given.config} on {nodes} x {per_node} {device.name}: predicted, nothing was run"]
    lines += report.head_lines(config, device)
    lines += ["", f"as configured: {refusal if asked is None else asked.name}"]
    if asked is not None:
        lines += report.layout_lines(asked, device, price, measured)
        lines += ["", *report.stage_lines(stages(config, nodes, per_node, device))]
    if best is not None:
        lines += [
            "",
            f"best: {best.name} (of the layouts within 5 % of the quickest that fits, the least memory)",
        ]
        if asked is None or best.config != asked.config:
            lines += report.layout_lines(best, device, price, None)
        lines += [f"  {line}"]
    lines += ["", *report.table_lines(layouts, given.rows, price)]
    lines += ["", "scaling, P and stage as configured:", *report.scaling_lines(curves)]
    print("\n".join(lines))
    return 0


def _write(path: Path, picture: bytes) -> None:
    from mf_train.errors import UserError
    from mf_train.files import write_whole

    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}: make it first")
    write_whole(path, picture)
