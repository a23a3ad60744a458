"""A plan as lines of text: what the run is, what it needs and costs, how to launch it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from mf_train.config import Config
from mf_train.config.phases import phases_of
from mf_train.errors import UserError
from mf_train.model.counts import count_parameters
from mf_train.planning.devices import Device
from mf_train.planning.measured import MeasuredRun
from mf_train.planning.plan import (
    HELD,
    USABLE,
    Plan,
    PlannedLayout,
    launch_line,
    make_layout,
    phase_edits,
    stages,
)
from mf_train.planning.scaling import MODELLED, NOT_MODELLED
from mf_train.planning.time import estimate_step
from mf_train.planning.work import run_work, step_tokens

Curves = dict[str, list[dict[str, Any]]]  # of `planning.scaling`


def plan_tree(
    plan: Plan, curves: Curves, measured: MeasuredRun | None, price: float | None
) -> dict[str, Any]:
    """The plan for JSON. `price`: of an hour of one device."""
    return {
        "device": plan.device.name,
        "measured_rates": plan.device.measured,
        "nodes": plan.nodes,
        "gpus_per_node": plan.per_node,
        "model": model_tree(plan.run),
        "phase": plan.phase.name,
        "configured": plan.configured.to_tree(price) if plan.configured else {"refused": plan.refusal},
        "measured": asdict(measured) if measured else None,
        "best": plan.best.to_tree(price) if plan.best else None,
        "launch": launch_line(plan, plan.best) if plan.best else None,
        "phase_edits": list(phase_edits(plan, plan.best).values()) if plan.best else [],
        "lighter": {
            "keys": plan.lighter.keys,
            "layout": plan.lighter.layout.to_tree(price),
            "launch": launch_line(plan, plan.lighter.layout),
            "phase_edits": list(phase_edits(plan, plan.lighter.layout).values()),
        }
        if plan.lighter
        else None,
        "layouts": [layout.to_tree() for layout in plan.layouts],
        "scaling": curves,
    }


def plan_lines(
    plan: Plan, curves: Curves, measured: MeasuredRun | None, price: float | None, shown: int
) -> Iterator[str]:
    """The plan as text, with a line for each of the first `shown` layouts."""
    configured, best, device = plan.configured, plan.best, plan.device
    yield f"{plan.path} on {plan.nodes} x {plan.per_node} {device.name}: predicted, nothing was run"
    yield from head_lines(plan.run, device)
    yield from phase_lines(plan)
    yield ""
    yield f"as configured: {configured.name if configured else plan.refusal}"
    if configured:
        yield from layout_lines(configured, device, price, measured)
        yield ""
        yield from stage_lines(stages(plan.config, plan.nodes, plan.per_node, device))
    if best:
        yield ""
        yield f"best: {best.name} (of the layouts within 5 % of the quickest that fits, the least memory)"
        if not configured or best.config != configured.config:
            yield from layout_lines(best, device, price, None)
        yield from launch_lines(plan, best)
    if plan.lighter:
        keys, layout = plan.lighter.keys, plan.lighter.layout
        words = " ".join(f"{key}={value}" for key, value in keys.items())
        yield ""
        start = "without offload" if best else "nothing fits; it"
        yield f"{start} would fit, with other results (docs/memory.md): {words}"
        yield f"  {layout.name}: {layout.time.seconds:.3f} s a step, peak {layout.memory.peak / 1e9:.2f} GB a rank"
        yield from launch_lines(plan, layout)
    yield ""
    yield from table_lines(plan.layouts, shown, price)
    yield ""
    yield "scaling, P and stage as configured:"
    yield from scaling_lines(curves)


def head_lines(config: Config, device: Device) -> Iterator[str]:
    """The model, the budget, the checkpoint, and where the rates come from."""
    counts, work = count_parameters(config.model), run_work(config)
    of_each = "" if config.phases else f" x {step_tokens(config):,} tokens"
    yield f"model     {config.model.description}: {counts.total:,} parameters, {counts.tables:,} of them in tables"
    yield f"budget    {config.training.steps:,} steps{of_each} = {work.tokens / 1e9:.4g} billion tokens"
    yield (
        f"work      {work.flops:.3g} model FLOPs and "
        f"{work.bytes_moved:.3g} bytes moved in all (docs/planning.md says what is counted)"
    )
    each, keep = counts.checkpoint_bytes, config.checkpoint.keep
    kept = f"{keep} kept and one being written: {(keep + 1) * each / 1e9:,.4g} GB" if keep else "all kept"
    yield f"disk      {each / 1e9:,.4g} GB a checkpoint; {kept}"
    yield f"device    {device.name}, {device.memory / 1e9:.0f} GB; {rates_text(device)}"


def launch_lines(plan: Plan, layout: PlannedLayout) -> Iterator[str]:
    """What to change in the file, where a phase sets a key of the layout, and the command that submits it."""
    if edits := phase_edits(plan, layout).values():
        yield f"  first write {'; '.join(edits)}, which the command line cannot change"
    yield f"  {launch_line(plan, layout)}"


def phase_lines(plan: Plan) -> Iterator[str]:
    """A line for each phase, where the run has several, and which of them the rest of the plan is about."""
    if not plan.run.phases:
        return
    yield ""
    for phase in phases_of(plan.run):
        training, length = phase.config.training, phase.config.model.sequence_length
        steps = f"steps {phase.first:,} to {phase.last:,}, {training.global_batch_size:,} x {length:,} tokens"
        try:
            layout = make_layout(phase.config, plan.nodes, plan.per_node, plan.device)
        except UserError as error:
            yield f"phase {phase.name!r}: {steps}; {error}"
            continue
        days = layout.time.seconds * phase.num_steps / 86400
        yield (
            f"phase {phase.name!r}: {steps}; as configured {layout.time.seconds:.3f} s a step, {days:.2f} days, peak "
            f"{layout.memory.peak / 1e9:.2f} GB a rank{'' if layout.fits else ': DOES NOT FIT'}"
        )
    why = ", which takes the most memory" if plan.configured else ""
    yield f"below: as if all steps were of phase {plan.phase.name!r}{why}"


def model_tree(config: Config) -> dict[str, Any]:
    """The model's size and the budget, for JSON."""
    counts, work = count_parameters(config.model), run_work(config)
    return {
        "parameters": counts.total,
        "table_parameters": counts.tables,
        "steps": config.training.steps,
        "tokens": work.tokens,
        "model_flops": work.flops,
        "bytes_moved": work.bytes_moved,
        "checkpoint_bytes": counts.checkpoint_bytes,
    }


def rates_text(device: Device) -> str:
    """Which rates are measured."""
    rates = ("copy", "gather", "flops", "launch", "host", "inside", "between")
    assumed = [name for name in rates if name not in device.measured]
    if not assumed:
        return "all rates measured"
    if len(assumed) == len(rates):
        return "rates are data-sheet or assumed, not measured: --device FILE.yaml replaces them"
    return f"measured rates, but {', '.join(assumed)} data-sheet or assumed"


def layout_lines(
    layout: PlannedLayout, device: Device, price: float | None, measured: MeasuredRun | None
) -> Iterator[str]:
    """One layout: time and cost, memory, each part with its bound, what the gather rate changes."""
    memory, time = layout.memory, layout.time
    yield f"  time    {cost_text(layout, time.seconds, price)}"
    if measured is not None:
        ratio = time.seconds / measured.step_seconds
        yield (
            f"  MEASURED {cost_text(layout, measured.step_seconds, price)} (median of {measured.steps} steps); "
            f"predicted / measured {ratio:.2f}"
        )
        if measured.peak_bytes:
            # a GPU's is that of torch's allocator, a CPU's that of the whole process
            predicted = memory.peak - (memory.process if device.kind == "cuda" else 0)
            yield (
                f"  MEASURED peak {measured.peak_bytes / 1e9:.2f} GB of rank 0; "
                f"predicted / measured {predicted / measured.peak_bytes:.2f}"
            )
    peak = max(memory.peaks, key=lambda name: memory.peaks[name])
    yield (
        f"  memory  peak {memory.peak / 1e9:.2f} GB a rank, at the {peak}: "
        f"{'fits' if layout.fits else f'DOES NOT FIT in {USABLE:.0%} of {device.memory / 1e9:.0f} GB'}"
    )
    if memory.host:
        total = memory.host * layout.per_node / 1e9
        purpose = "what is offloaded, and a copy to save beside the steps"
        yield f"  host    {memory.host / 1e9:.2f} GB a rank, {total:.3g} GB a node: {purpose}"
    for part in sorted(time.parts, key=lambda part: -part.seconds):
        share = part.seconds / time.seconds
        yield f"    {part.name:<18} {part.seconds:>9.4f} s  {share:>4.0%}  bound: {part.bound}"
    if layout.config.model.layer_kinds & {"memory", "product_key"}:
        slow, quick = sensitivity(layout, device)
        source = "measured" if "gather" in device.measured else "a guess"
        yield (
            f"  at half the gather rate ({device.gather:.2g} bytes/s, {source}) a step takes {slow:.3g} s, at twice "
            f"{quick:.3g} s"
        )


def stage_lines(layouts: Sequence[PlannedLayout]) -> Iterator[str]:
    """What a rank holds under each ZeRO stage, a line each; optimizer: moments, and float32 masters that are apart."""
    yield "GB a rank  " + "".join(f"{name:>13}" for name in (*HELD, "peak")) + "   s/step"
    for layout in layouts:
        values = [getattr(layout.memory, name) for name in HELD] + [layout.memory.peak]
        yield (
            f"  ZeRO {layout.config.parallel.zero_stage:<4}"
            + "".join(f"{value / 1e9:>13.3f}" for value in values)
            + f"{layout.time.seconds:>9.3f}{'' if layout.fits else '  DOES NOT FIT'}"
        )
    yield "  codes are among the activations; gradients: sums over micro-batches that stay; buffers: communication"


def sensitivity(layout: PlannedLayout, device: Device) -> tuple[float, float]:
    """Seconds of a step at half and at twice the gather rate."""
    slow, quick = (
        estimate_step(
            layout.config, layout.nodes, layout.per_node, replace(device, gather=factor * device.gather)
        ).seconds
        for factor in (0.5, 2.0)
    )
    return slow, quick


def cost_text(layout: PlannedLayout, seconds: float, price: float | None) -> str:
    """Speed, days, device-hours and money at so many seconds a step."""
    devices = layout.nodes * layout.per_node
    hours = seconds * layout.config.training.steps / 3600
    speed = layout.time.tokens / seconds
    money = "" if price is None else f", cost {hours * devices * price:,.0f}"
    return (
        f"{seconds:.3f} s a step, {speed:,.0f} tokens/s ({speed / devices:,.0f} a device), {hours / 24:.2f} days, "
        f"{hours * devices:,.0f} device-hours{money}"
    )


def table_lines(layouts: list[PlannedLayout], shown: int, price: float | None) -> Iterator[str]:
    """A line for each layout; `with`: what it does to take less memory."""
    head = f"{'P':>2} {'R':>5} {'ZeRO':>4} {'micro':>5} {'GB':>7} {'fits':>4} {'s/step':>9} {'tokens/s':>12} "
    yield head + f"{'days':>8} {'device-h':>10}" + ("" if price is None else f" {'cost':>10}") + "  with"
    for layout in layouts[:shown]:
        parallel = layout.config.parallel
        yield (
            f"{parallel.tensor:>2} {layout.data:>5} {parallel.zero_stage:>4} "
            f"{layout.config.training.micro_batch_size:>5} {layout.memory.peak / 1e9:>7.2f} "
            f"{'yes' if layout.fits else 'no':>4} {layout.time.seconds:>9.3f} {layout.time.tokens_per_second:>12,.0f} "
            f"{layout.days:>8.2f} {layout.device_hours:>10,.0f}"
            + ("" if price is None else f" {layout.device_hours * price:>10,.0f}")
            + f"  {'+'.join(layout.switched_on) or '-'}"
        )
    if not layouts[0].fits:
        yield f"nothing fits in {USABLE:.0%} of the memory: take more devices, or a smaller model or sequence"


def scaling_lines(curves: Curves) -> Iterator[str]:
    """A line for each point of the curves, and what they leave out."""
    for name, points in curves.items():
        first = next((one for one in points if "refused" not in one), None)
        for point in points:
            start = f"  {name:<6} {point['devices']:>5} devices, {point['global_batch_size']:>9,} sequences: "
            if "refused" in point:
                yield start + point["refused"]
                continue
            assert first is not None
            per_device = point["tokens_per_second_per_device"]
            share = per_device / first["tokens_per_second_per_device"]
            yield (
                f"{start}{point['step_seconds']:.3f} s, {point['tokens_per_second']:,.0f} tokens/s, "
                f"{share:.0%} of the first's speed a device{'' if point['fits'] else '; DOES NOT FIT'}"
            )
    yield f"  {MODELLED}"
    yield f"  {NOT_MODELLED}"
