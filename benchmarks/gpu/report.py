"""What was found, as tables: one for each kind of figure, and a short one of all parts, which comes last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.gpu.runner import PartResult
from benchmarks.tables import aligned, table

Values = Mapping[str, Any]
_LONGEST = 12  # parts of a profile that are shown


def values_of(outcome: PartResult) -> dict[str, Values]:
    """The values of each step that gave some."""
    return {step["step"]: step["values"] for step in outcome.steps if "values" in step}


def short_table(outcomes: list[PartResult]) -> str:
    """A line for each part: how it ended, its seconds, and its figures or what failed."""
    rows = [
        [outcome.name, _state(outcome), f"{outcome.seconds:.0f} s", _result(outcome)] for outcome in outcomes
    ]
    return "\n".join(aligned(rows, left=(0, 1, 3)))


def failures(outcomes: list[PartResult]) -> list[str]:
    """A line for every step that failed and every part that did not go through."""
    lines = []
    for outcome in outcomes:
        if outcome.reason:
            lines.append(f"{outcome.name}: {outcome.reason}")
        lines += [
            f"{outcome.name}: {step['step']}: {step['error']}" for step in outcome.steps if "error" in step
        ]
    return lines


def skips(outcomes: list[PartResult]) -> list[str]:
    """A line for every reason for which tests of a part were skipped."""
    counts: dict[tuple[str, str], int] = {}
    for outcome in outcomes:
        for step in outcome.steps:
            if "skipped" in step:
                key = (outcome.name, step["skipped"])
                counts[key] = counts.get(key, 0) + 1
    return [f"{name}: {count} skipped: {reason}" for (name, reason), count in counts.items()]


def long_tables(outcomes: list[PartResult]) -> str:
    """The figures of every part that has more than a line of them."""
    makers: dict[str, Callable[[dict[str, Values]], list[str]]] = {
        "rates": rate_table,
        "lookup": lookup_table,
        "training": training_tables,
        "decoding": decoding_table,
    }
    texts = []
    for outcome in outcomes:
        if outcome.name in makers and (values := values_of(outcome)):
            texts += makers[outcome.name](values)
    return "\n\n".join(texts)


def _state(outcome: PartResult) -> str:
    if outcome.reason.startswith("not run"):
        return "not run"
    failed = sum("error" in step for step in outcome.steps)
    if failed:
        return f"{failed} of {len(outcome.steps)} failed"
    return "cut short" if outcome.reason else "ok"


def _result(outcome: PartResult) -> str:
    if outcome.reason.startswith("not run"):
        return outcome.reason.removeprefix("not run: ")
    values = values_of(outcome)
    shown = _HEADLINES.get(outcome.name, _test_headline)(outcome, values)
    return "; ".join(part for part in (shown, outcome.reason) if part)


def _test_headline(outcome: PartResult, values: dict[str, Values]) -> str:
    skipped = sum("skipped" in step for step in outcome.steps)
    return f"{len(values)} passed" + (f", {skipped} skipped" if skipped else "")


def _rate_headline(outcome: PartResult, values: dict[str, Values]) -> str:
    found = []
    if "copy" in values:
        found.append(f"copy {_tera(values['copy']['memory'])} TB/s")
    if "gather L2" in values:
        found.append(f"gather in L2 {_tera(values['gather L2']['L2'])} TB/s")
    if "product" in values:
        found.append(f"bfloat16 {_tera(values['product']['bfloat16'])} TFLOP/s")
    if "launch" in values:
        found.append(f"launch {1e6 * values['launch']['behind each other']:.1f} us")
    return ", ".join(found)


def _lookup_headline(outcome: PartResult, values: dict[str, Values]) -> str:
    shapes = lookup_shapes(values)
    if not shapes:
        return ""
    name, first = next(iter(shapes.items()))
    forward, backward = _number(first.get("triton")), _number(first.get("triton backward"))
    return f"{name}: Triton forward {forward}, backward {backward} ns a token"


def _training_headline(outcome: PartResult, values: dict[str, Values]) -> str:
    found = []
    for name in ("tiny", "small"):
        if name not in values:
            continue
        speed, peer = values[name]["tokens_per_second"], values.get(f"dense-{name}")
        beside = f", {speed / peer['tokens_per_second']:.2f} of its dense peer's" if peer else ""
        found.append(f"{name} {speed:,.0f} tokens/s{beside}")
    return "; ".join(found)


def _decoding_headline(outcome: PartResult, values: dict[str, Values]) -> str:
    found = []
    for name, cases in values.items():
        one = cases["1 x 64"]
        ratio = one["memoryformer"] / one["gpt_neox"]
        found.append(f"{name} {one['memoryformer']:.0f} tokens/s, {ratio:.2f} of GPT-NeoX's")
    return "; ".join(found)


_HEADLINES: dict[str, Callable[[PartResult, dict[str, Values]], str]] = {
    "rates": _rate_headline,
    "lookup": _lookup_headline,
    "training": _training_headline,
    "decoding": _decoding_headline,
}


def rate_table(values: dict[str, Values]) -> list[str]:
    rows = []
    for step, unit, scale in (("copy", "TB/s", 1e12), ("product", "TFLOP/s", 1e12), ("launch", "us", 1e-6)):
        rows += [[f"{step}, {name}", f"{v / scale:.3g}", unit] for name, v in values.get(step, {}).items()]
    for level in ("L1", "L2", "memory"):
        for name, v in values.get(f"gather {level}", {}).items():
            rows.append([f"gather of rows, {name}", f"{v / 1e12:.3g}", "TB/s"])
    return [table(["rate", "reached", ""], rows)] if rows else []


def lookup_shapes(values: dict[str, Values]) -> dict[str, Values]:
    """The steps of part lookup that timed a shape."""
    return {step: found for step, found in values.items() if step.startswith("D ")}


def lookup_table(values: dict[str, Values]) -> list[str]:
    texts = []
    if shapes := lookup_shapes(values):
        columns = list(dict.fromkeys(way for found in shapes.values() for way in found))
        rows = [[step, *(_number(found.get(way)) for way in columns)] for step, found in shapes.items()]
        texts += [
            "ns a token, bfloat16, tau 8, K = D / 8; N tokens; -: did not run",
            table(["D = O", *columns], rows),
        ]
    fused = [
        [f"{step}, {way}", _number(found)]
        for step in ("loss", "rotation")
        for way, found in values.get(step, {}).items()
    ]
    return [*texts, table(["", "ns a token"], fused)] if fused else texts


def training_tables(values: dict[str, Values]) -> list[str]:
    rows = []
    for name, found in values.items():
        shares = [
            "-" if found[key] is None else f"{found[key]:.0%}" for key in ("bandwidth_share", "flops_share")
        ]
        rows.append(
            [
                name,
                f"{found['tokens_per_second']:,.0f}",
                f"{found['peak_memory_bytes'] / 1e9:.1f}",
                *shares,
                str(found["micro_batch_size"]),
                f"{found['first_step_seconds']:.0f}",
            ]
        )
    header = ["trainer", "tokens/s", "peak GB", "of bandwidth", "of FLOP/s", "micro-batch", "s to step 1"]
    return [
        table(header, rows),
        *(text for name, found in values.items() for text in profile_table(name, found)),
    ]


def profile_table(name: str, found: Values) -> list[str]:
    """The parts of a profiled step, the longest first, in ms and as a share."""
    parts = found["profile"]["parts"]
    key = "device_seconds" if any(part["device_seconds"] for part in parts.values()) else "cpu_seconds"
    total = sum(part[key] for part in parts.values()) or 1.0
    steps = found["profile"]["steps"]
    longest = sorted(((row[key], part) for part, row in parts.items()), reverse=True)
    rest = sum(seconds for seconds, _ in longest[_LONGEST:])
    shown = [*longest[:_LONGEST], (rest, f"{len(longest[_LONGEST:])} others")]
    rows = [
        [part, f"{1e3 * seconds / steps:.2f}", f"{seconds / total:.1%}"] for seconds, part in shown if seconds
    ]
    return [table([f"{name}, {key.removesuffix('_seconds')} time of a step", "ms", "share"], rows)]


def decoding_table(values: dict[str, Values]) -> list[str]:
    rows = []
    for name, cases in values.items():
        for case, found in cases.items():
            ours, peer = found["memoryformer"], found["gpt_neox"]
            rows.append([f"{name}, {case}", f"{ours:.0f}", f"{peer:.0f}", f"{ours / peer:.2f}"])
    return [table(["decoding, batch x prompt", "tokens/s", "GPT-NeoX", "ratio"], rows)] if rows else []


def _tera(value: float) -> str:
    return f"{value / 1e12:.3g}"


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"
