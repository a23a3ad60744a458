"""The arguments of `memoryformer plan`, and what they call."""

import argparse
import json
from typing import Any

from mf_train.commands import add_command


def add_plan(commands: Any) -> None:
    """Add the command to the command line's parser."""
    parser = add_command(
        commands,
        "plan",
        "memory, step time and cost of a run, from its configuration alone",
        "memoryformer plan configs/base.yaml --nodes 4 --gpus-per-node 8 --device h100",
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
        help="h100, a100, cpu, or a YAML file of measured rates (h100)",
    )
    parser.add_argument("--rows", type=_positive, default=10, metavar="K", help="layouts that are shown (10)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: it must be 1 or more")
    return value


def _plan(given: argparse.Namespace) -> int:
    from mf_train.config.loading import load_config
    from mf_train.errors import UserError
    from mf_train.planning.devices import find_device
    from mf_train.planning.plan import make_layout, scaling, search, summary

    device = find_device(given.device)
    config = load_config(given.config, given.overrides)
    try:
        asked, refusal = make_layout(config, given.nodes, given.gpus_per_node, device), None
    except UserError as error:
        asked, refusal = None, str(error)
    layouts = search(config, given.nodes, given.gpus_per_node, device)
    if not layouts:
        raise UserError(refusal or "no layout divides")
    if given.json:
        print(
            json.dumps(
                {
                    "device": device.name,
                    "nodes": given.nodes,
                    "gpus_per_node": given.gpus_per_node,
                    "configured": asked.to_tree() if asked else {"refused": refusal},
                    "best": layouts[0].to_tree() if layouts[0].fits else None,
                    "layouts": [layout.to_tree() for layout in layouts],
                    "scaling": scaling(config, given.gpus_per_node, device),
                }
            )
        )
        return 0
    if refusal:
        print(f"as configured: {refusal}")
    for line in summary(config, device, asked, layouts, given.rows):
        print(line)
    return 0
