"""What the nodes' measurements mean: which node stands out, and the table. Pure functions over what they printed."""

import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# A value is slow below this share of the upper quartile of its kind, which is that of good nodes even where some are
# not. GPUs and their links are alike on every node. Processes on CPUs disturb each other, and so do users of storage:
# a slow write is only told, and fails where a checkpoint would not be saved in time.
SLOW = {"copy": 0.8, "inside": 0.6, "link": 0.5, "write": 0.25, "read": 0.25}
SLOW_CPU = SLOW | {"copy": 0.3, "inside": 0.2, "link": 0.25}
LESS_MEMORY = 0.8  # of the upper quartile
CLOCK_SECONDS = 1.0  # beyond the round trip: the first error of a start is found by time
SEEN_SECONDS = 2.0  # until a replaced file is seen
SPARE_FILES = 256  # open files beside two connections for every process
SHARED_MEMORY = 1 << 30  # bytes of /dev/shm: NCCL's buffers between the GPUs of a node
NOTED = ("kernel", "glibc", "driver", "hash and lookup")  # versions that may differ; they are told
ROWS, WIDTH = 16, 118  # of the table; of more nodes only those that stand out have a row
STAGES = ("", "node", "met", "clock", "memory", "kernel", "storage", "names", "network", "done")
COLUMNS = (  # heading, unit, value's name, factor, sentence about a slow one
    ("copy", "GB/s", "copy", 1.0, "copies in the memory of its device {device} run at"),
    ("inside", "GB/s", "inside", 1.0, "all-reduces inside it run at"),
    ("across", "GB/s", "across", 1.0, ""),
    ("to next", "GB/s", "link", 1.0, ""),
    ("write", "MB/s", "write", 1e-6, "writes to the run's folder at"),
    ("read", "MB/s", "read", 1e-6, "reads from the run's folder at"),
    ("seen in", "s", "seen", 1.0, ""),
    ("clock", "ms", "skew", 1e3, ""),
)


@dataclass
class Node:
    """A node's measurements."""

    name: str
    answers: bool = True
    stage: str = ""  # the last one that all its processes that spoke have passed
    failed: tuple[str, str] | None = None  # stage and error
    versions: dict[str, str] = field(default_factory=dict)
    gpus: int = 0  # that its processes see: the same ones, or one each
    resources: dict[str, int] = field(default_factory=dict)  # as machine.resources
    values: dict[str, dict[int, float]] = field(default_factory=dict)  # by the names of COLUMNS, then by rank
    problems: list[str] = field(default_factory=list)

    def value(self, name: str) -> float | None:
        """The smallest over the node's processes."""
        return min(self.values[name].values()) if self.values.get(name) else None


class Finding(NamedTuple):
    """Something about a node or some, and whether a run would fail or be slowed by it."""

    nodes: tuple[str, ...]
    text: str
    fails: bool = True


@dataclass(frozen=True)
class Expected:
    """The run's needs."""

    processes: int  # of a node
    gpus: int  # of a node; 0: a run on CPUs
    checkpoint_bytes: int
    kept: int  # checkpoints in the folder at once, with the one that is written
    notice: int  # seconds


def collect(names: Sequence[str], answering: Iterable[str], lines: Iterable[dict[str, Any]]) -> list[Node]:
    """The nodes in the order of `names`, with what their processes printed."""
    there = set(answering)
    nodes = {name: Node(name, name in there) for name in names}
    reached: dict[str, dict[int, str]] = {name: {} for name in names}
    seen: dict[str, dict[int, int]] = {name: {} for name in names}  # GPUs of each process
    for line in lines:
        node = nodes[line["node"]]
        if line["stage"] == "failed":
            told = (line["during"], line["error"])
            node.failed = min(node.failed or told, told, key=lambda failed: STAGES.index(failed[0]))
        else:
            reached[node.name][line["rank"]] = line["stage"]
        node.versions |= line.get("versions", {})
        node.resources |= line.get("resources", {})
        if "gpus" in line:
            seen[node.name][line["rank"]] = line["gpus"]
        node.problems += [line["problem"]] if "problem" in line else []
        for key in [column[2] for column in COLUMNS] + ["round_trip"]:
            if key in line:
                node.values.setdefault(key, {})[line["rank"]] = line[key]
    for name, stages in reached.items():
        nodes[name].stage = min(stages.values(), key=STAGES.index, default="")
        counts = seen[name].values()
        nodes[name].gpus = sum(counts) if set(counts) == {1} else min(counts, default=0)
    return list(nodes.values())


def judge(nodes: Sequence[Node], expected: Expected) -> list[Finding]:
    """The findings; those that would make a run fail come first."""
    spoke = [node for node in nodes if node.answers]
    findings = []
    if silent := tuple(node.name for node in nodes if not node.answers):
        findings.append(Finding(silent, "no program could be started there in time"))
    findings += _unfinished(spoke) + _different_versions(spoke) + _own_problems(spoke, expected)
    findings += _slow_values(spoke, expected) + _slow_links(spoke, expected) + _short_of(spoke, expected)
    if (seconds := checkpoint_seconds(nodes, expected)) and seconds > expected.notice:
        text = f"a checkpoint takes about {seconds:.0f} s here and the notice is {expected.notice} s: set --notice"
        findings.append(Finding((), f"{text} {int(1.5 * seconds) + 60} or more"))
    return sorted(findings, key=lambda finding: not finding.fails)


def checkpoint_seconds(nodes: Sequence[Node], expected: Expected) -> float | None:
    """About how long writing a checkpoint takes: each node writes its share at the rate of the slowest."""
    rates = [rate for node in nodes if (rate := node.value("write"))]
    return expected.checkpoint_bytes / len(rates) / min(rates) if rates else None


def _unfinished(nodes: Sequence[Node]) -> list[Finding]:
    """Nodes that did not come to the end. Where one is lost the others wait for it and fail: only it is named."""
    if lost := [node for node in nodes if node.stage != "done" and not node.failed]:
        first = min((node.stage for node in lost), key=STAGES.index)
        names = tuple(node.name for node in lost if node.stage == first)
        place = f" after stage {first!r}" if first else ""
        return [Finding(names, f"sent nothing{place}: it hangs or was killed")]
    failed = [(node.name, *node.failed) for node in nodes if node.failed]
    failed = [
        told for told in failed if not told[2].startswith(("Timeout", "DistStore", "DistNetwork"))
    ] or failed
    first = min((stage for _, stage, _ in failed), key=STAGES.index, default="")
    errors = dict.fromkeys(error for _, stage, error in failed if stage == first)
    return [
        Finding(tuple(name for name, *told in failed if told == [first, error]), f"in {first!r}: {error}")
        for error in errors
    ]


def _different_versions(nodes: Sequence[Node]) -> list[Finding]:
    findings = []
    told = [node for node in nodes if node.versions]
    for package in sorted({package for node in told for package in node.versions}):
        found = {node.name: node.versions.get(package, "none") for node in told}
        (usual, most), *rest = Counter(found.values()).most_common()
        majority = not rest or most > rest[0][1]
        label = "the sources of mf_train (digest)" if package == "mf_train" else package
        for version in dict.fromkeys(found.values()) if rest else ():
            if not (majority and version == usual):
                names = tuple(name for name, own in found.items() if own == version)
                others = f"{most} others have {usual}" if majority else "there is no majority"
                findings.append(Finding(names, f"{label}: {version}; {others}", package not in NOTED))
    return findings


def _own_problems(nodes: Sequence[Node], expected: Expected) -> list[Finding]:
    findings = []
    for node in nodes:
        who = (node.name,)
        if node.versions and node.gpus < expected.gpus:
            findings.append(Finding(who, f"sees {node.gpus} of {expected.gpus} GPUs"))
        findings += [Finding(who, problem) for problem in node.problems]
        skew = node.value("skew") or 0.0
        if abs(skew) > CLOCK_SECONDS + (node.value("round_trip") or 0.0):
            text = f"its clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the first node's"
            findings.append(Finding(who, f"{text}: look at its time service"))
        if (seen := node.value("seen") or 0.0) > SEEN_SECONDS:
            findings.append(Finding(who, f"sees a file that another replaced only after {seen:.1f} s", False))
    return findings


def _slow_values(nodes: Sequence[Node], expected: Expected) -> list[Finding]:
    findings, limits = [], SLOW if expected.gpus else SLOW_CPU
    for _, unit, name, factor, sentence in COLUMNS:
        usual = upper_quartile([value for node in nodes for value in node.values.get(name, {}).values()])
        for node in nodes:
            value = node.value(name)
            if sentence and value is not None and value < limits[name] * usual:
                worst = min(node.values[name], key=node.values[name].__getitem__)
                text = f"{value * factor:.3g} {unit}, where {usual * factor:.3g} are usual here"
                text = f"{sentence.format(device=worst % expected.processes)} {text}"
                findings.append(Finding((node.name,), text, name not in ("write", "read")))
    return findings


def _slow_links(nodes: Sequence[Node], expected: Expected) -> list[Finding]:
    """Link i joins node i and the next. A node with two slow links is slow itself; one alone is the link's fault.

    Of two nodes, with their one link, nothing can be said.
    """
    rates, share = [node.value("link") for node in nodes], (SLOW if expected.gpus else SLOW_CPU)["link"]
    usual = upper_quartile([rate for rate in rates if rate is not None])
    slow = [rate is not None and rate < share * usual for rate in rates]
    findings, explained = [], set()
    for i, node in enumerate(nodes):
        if slow[i] and slow[i - 1]:
            explained |= {i, (i - 1) % len(nodes)}
            two = f"{rates[i - 1]:.3g} and {rates[i]:.3g} GB/s"
            text = f"its network is slow: {two} to its neighbours, where {usual:.3g} are usual here"
            findings.append(Finding((node.name,), text))
    for i, node in enumerate(nodes):
        if slow[i] and i not in explained:
            text = f"the link between them carries {rates[i]:.3g} GB/s, where {usual:.3g} are usual here"
            findings.append(Finding((node.name, nodes[(i + 1) % len(nodes)].name), text))
    return findings


def _short_of(nodes: Sequence[Node], expected: Expected) -> list[Finding]:
    """Nodes that have less than is needed of free space, open files, /dev/shm and memory."""
    space = expected.kept * expected.checkpoint_bytes
    files = 2 * expected.processes * len(nodes) + SPARE_FILES
    memory = upper_quartile([node.resources["memory"] for node in nodes if node.resources])
    buffers = SHARED_MEMORY if expected.gpus else 0
    tests = [
        (
            "free",
            space,
            True,
            f"not {space / 1e9:.3g} GB free in the run's folder for {expected.kept} checkpoints",
        ),
        ("open_files", files, True, f"a process may open fewer than {files} files: raise `ulimit -n`"),
        ("memory", LESS_MEMORY * memory, False, f"has less free memory than others ({memory / 1e9:.3g} GB)"),
        ("shared_memory", buffers, False, "less than 1.1 GB free in /dev/shm, where NCCL has its buffers"),
    ]
    findings = []
    for name, least, fails, text in tests:
        if names := tuple(node.name for node in nodes if node.resources and node.resources[name] < least):
            findings.append(Finding(names, text, fails))
    return findings


def upper_quartile(values: Sequence[float]) -> float:
    """The smallest value that three quarters of all do not exceed; 0 of none."""
    return sorted(values)[-(-3 * len(values) // 4) - 1] if values else 0.0


def table(nodes: Sequence[Node], findings: Sequence[Finding]) -> str:
    """A row a node; of more than ROWS nodes those that stand out; and the smallest, median and largest values."""
    named = {name for finding in findings for name in finding.nodes}
    shown = [node for node in nodes if len(nodes) <= ROWS or node.name in named][: 2 * ROWS]
    wide = max(6, *(len(node.name) for node in nodes))

    def row(name: str, cells: Iterable[str], mark: str = " ") -> str:
        return f"{mark} {name:<{wide}}{''.join(f'{cell:>9}' for cell in cells)}".rstrip()

    lines = [row("node", ["GPUs", *(column[0] for column in COLUMNS), "memory"])]
    lines.append(row("", ["", *(column[1] for column in COLUMNS), "GB"]))
    for node in shown:
        cells = [_number(node.value(name), factor) for _, _, name, factor, _ in COLUMNS]
        cells = [str(node.gpus), *cells, _number(node.resources.get("memory"), 1e-9)]
        lines.append(row(node.name, cells, "!" if node.name in named else " "))
    for label, of in (("min", min), ("median", statistics.median), ("max", max)) if len(nodes) > 2 else ():
        cells = [""]
        for _, _, name, factor, _ in COLUMNS:
            values = [value for node in nodes for value in node.values.get(name, {}).values()]
            cells.append(_number(of(values) if values else None, factor))  # type: ignore[operator]
        lines.append(row(label, cells))
    return "\n".join(lines)


def summary(nodes: Sequence[Node], findings: Sequence[Finding], expected: Expected) -> str:
    """How long a checkpoint takes, the findings, and the verdict."""
    lines = []
    if seconds := checkpoint_seconds(nodes, expected):
        size = f"{expected.checkpoint_bytes / 1e9:.3g} GB"
        lines.append(
            f"A checkpoint ({size}) takes about {seconds:.2g} s here; the notice is {expected.notice} s."
        )
    for finding in findings:
        who = f"{list_names(finding.nodes)}: " if finding.nodes else ""
        line = f"{'FAIL' if finding.fails else 'note'}  {who}{finding.text}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="      ")
    bad = list(dict.fromkeys(name for finding in findings if finding.fails for name in finding.nodes))
    if not any(finding.fails for finding in findings):
        noted = "; see the notes" if findings else ""
        verdict = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}, fit for this run{noted}"
    elif bad and len(bad) < len(nodes):
        verdict = f"{list_names(bad)} {'stand' if len(bad) > 1 else 'stands'} out"
    else:
        verdict = "not fit for this run, for the reasons above"
    return "\n".join([*lines, f"verdict: {verdict}"])


def list_names(names: Sequence[str]) -> str:
    """`n1, n2 and n3`; of many, the first eight."""
    if len(names) > 8:
        return f"{', '.join(names[:8])} and {len(names) - 8} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _number(value: float | None, factor: float) -> str:
    if value is None:
        return "-"
    value = value * factor + 0.0  # no -0
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
