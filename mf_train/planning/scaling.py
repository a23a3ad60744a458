"""Weak and strong scaling at 8 to 4096 devices, as `planning.time` models it; nothing is measured."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mf_train.config import Config
from mf_train.config.groups import group_rules, groups_of
from mf_train.config.phases import phases_of
from mf_train.config.schedule import rate_of
from mf_train.config.sections import decay_steps, warmup_steps
from mf_train.errors import UserError
from mf_train.parallel.degrees import micro_batch_sizes
from mf_train.planning.devices import Device
from mf_train.planning.plan import make_layout

SCALES = (8, 64, 512, 4096)
MODELLED = (
    "modelled: bytes and FLOPs of each kernel at the device's rates, a launch for each operation, ring collectives "
    "with a latency for each step, smaller micro-batches as the batch is shared out; parts follow one another"
)
NOT_MODELLED = (
    "not modelled: reading data, saving, validation, stragglers, failures and restarts, a network that is shared or "
    "congested, rates that change with sizes, overlap of communication and computation"
)


def scaling(config: Config, nodes: int, per_node: int, device: Device) -> dict[str, list[dict[str, Any]]]:
    """A point for each of SCALES and each curve. strong: the same global batch; weak: the same batch for each rank of
    the data-parallel group as on `nodes` nodes. P and stage are the configuration's.

    Micro-batches shrink with what a rank has. Every point has passed `check_degrees`; one that cannot work says so
    under `refused`.
    """
    tensor = config.parallel.tensor
    own = max(1, config.training.global_batch_size * tensor // (nodes * per_node))
    curves: dict[str, list[dict[str, Any]]] = {"strong": [], "weak": []}
    for devices in SCALES:
        data = devices // tensor
        for name, batch in (("strong", config.training.global_batch_size), ("weak", own * data)):
            curves[name].append(_point(config, devices, per_node, batch, device))
    return curves


def _point(config: Config, devices: int, per_node: int, batch: int, device: Device) -> dict[str, Any]:
    found: dict[str, Any] = {"devices": devices, "global_batch_size": batch}
    if devices % per_node:
        return found | {"refused": f"{devices} devices are no whole number of nodes of {per_node}"}
    if devices % config.parallel.tensor:
        return found | {
            "refused": f"parallel.tensor {config.parallel.tensor} does not divide {devices} devices"
        }
    data = devices // config.parallel.tensor
    here = replace(config, training=replace(config.training, global_batch_size=batch))
    try:
        layout = make_layout(here, devices // per_node, per_node, device)
    except UserError as error:
        return found | {"refused": str(error)}
    return found | {
        "micro_batch_size": micro_batch_sizes(here, data)[0],
        "fits": layout.fits,
        "step_seconds": layout.time.seconds,
        "tokens_per_second": layout.time.tokens_per_second,
        "tokens_per_second_per_device": layout.time.tokens_per_second / devices,
    }


def draw_scaling(config: Config, run: Config, title: str, curves: dict[str, list[dict[str, Any]]]) -> bytes:
    """PNG: tokens a second over devices, both curves, each with the line of a perfect one; and `run`'s rates."""
    from mf_train.drawing import make_figure, make_png

    figure, (*several, last) = make_figure(3, (5.4, 4.4))
    _draw_schedule(last, run)
    batch = config.training.global_batch_size
    names = {
        "strong": f"strong scaling: {batch:,} sequences a step, whatever the devices",
        "weak": "weak scaling: the same sequences a step for each rank",
    }
    for axes, (kind, points) in zip(several, curves.items(), strict=True):
        points = [point for point in points if "refused" not in point]
        axes.set_title(names[kind], fontsize=9)
        axes.set_xlabel("devices")
        axes.set_ylabel("modelled throughput (tokens/s)")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.margins(0.28, 0.15)
        axes.grid(True, alpha=0.3)
        axes.set_xticks(SCALES, [f"{devices:,}" for devices in SCALES])
        if not points:
            axes.text(0.5, 0.5, "no size works", transform=axes.transAxes, ha="center")
            continue
        devices = [point["devices"] for point in points]
        speeds = [point["tokens_per_second"] for point in points]
        perfect = [speeds[0] * count / devices[0] for count in devices]
        axes.plot(devices, perfect, linestyle="--", color="grey", linewidth=1, label="perfect")
        axes.plot(devices, speeds, color="C0", marker="o", label="modelled (hollow: does not fit in memory)")
        hollow = [(p["devices"], p["tokens_per_second"]) for p in points if not p["fits"]]
        axes.plot(*zip(*hollow, strict=True) if hollow else ([], []), "o", color="C0", mfc="white", zorder=3)
        for point, ideal in zip(points, perfect, strict=True):
            text = f"{point['tokens_per_second'] / ideal:.0%}\n{point['global_batch_size']:,} seq."
            axes.annotate(
                text,
                (point["devices"], point["tokens_per_second"]),
                xytext=(4, -22),
                textcoords="offset points",
                fontsize=7,
            )
        axes.legend(fontsize=7, loc="upper left")
    below = "nothing overlaps; ring collectives; no stragglers, congestion, data or checkpoints: no point is measured"
    figure.suptitle(f"{title}\n{below}", fontsize=9)
    return make_png(figure)


def schedule_points(
    config: Config, multipliers: Sequence[float] | None = None, most: int = 2000
) -> list[tuple[int, float]]:
    """Steps of a run, at most so many and some more where the rate turns, with the learning rate of each.

    `multipliers`: of the rate in each phase; None: 1.
    """
    steps = config.training.steps
    shown = {1 + place * (steps - 1) // (most - 1) for place in range(most)} | {steps}
    phases = phases_of(config)
    for phase in phases:
        schedule, over = phase.config.schedule, phase.schedule_steps
        turns = warmup_steps(schedule, len(over)), len(over) - decay_steps(schedule, len(over))
        shown |= {phase.first, phase.last, *(over[turn - 1] for turn in turns if 0 < turn <= len(over))}
    return [
        (step, scale * rate_of(phase, step))
        for phase, scale in zip(phases, multipliers or [1.0] * len(phases), strict=True)
        for step in sorted(shown)
        if phase.first <= step <= phase.last
    ]


def rate_lines(config: Config) -> dict[tuple[float, ...], list[str]]:
    """Groups of parameters by their rates, each as a multiple of `optimizer.learning_rate` in every phase."""
    size = config.model.hidden_size
    rules = [group_rules(phase.config.optimizer, size) for phase in phases_of(config)]
    lines: dict[tuple[float, ...], list[str]] = {}
    for group in groups_of(config.model):
        lines.setdefault(tuple(each[group].multiplier for each in rules), []).append(group)
    return lines


def _draw_schedule(axes: Any, config: Config) -> None:
    for multipliers, groups in rate_lines(config).items():
        axes.plot(*zip(*schedule_points(config, multipliers), strict=True), label=", ".join(groups))
    kinds = ", then ".join(dict.fromkeys(phase.config.schedule.kind for phase in phases_of(config)))
    axes.set_title(f"learning rate: {kinds}, {config.training.steps:,} steps", fontsize=9)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.grid(True, alpha=0.3)
    if len(axes.lines) > 1:
        axes.legend(fontsize=7)
