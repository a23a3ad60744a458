"""What is made of the nodes' measurements, on made-up ones."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mf_train.launch.verdict import Expected, Finding, Node, collect, judge, summary, table

GB = 10**9
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "mf_train": "0af42c09495b", "kernel": "6.1"}
EXPECTED = Expected(processes=8, gpus=8, checkpoint_bytes=12 * GB, kept=3, notice=120)
USUAL = {
    "copy": 2500.0,
    "inside": 400.0,
    "across": 45.0,
    "link": 48.0,
    "write": 2e9,
    "read": 4e9,
    "seen": 0.01,
}


def good(count: int, noise: float = 0.0) -> list[Node]:
    """Nodes with 8 GPUs on which all is well; `noise` is the largest relative deviation of a value."""
    draw = random.Random(0)
    nodes = []
    for number in range(count):
        values = {
            name: {number * 8 + rank: value * (1 + draw.uniform(-noise, noise)) for rank in range(8)}
            for name, value in USUAL.items()
        }
        resources = {"memory": 10**12, "shared_memory": 10**11, "free": 10**13, "open_files": 65536}
        values["skew"], values["round_trip"] = {number * 8: 1e-4}, {number * 8: 1e-4}
        nodes.append(
            Node(f"n{number + 1}", True, "done", None, dict(VERSIONS), 8, resources, values, problems=[])
        )
    return nodes


def slow_down(node: Node, name: str, share: float) -> None:
    node.values[name] = {rank: value * share for rank, value in node.values[name].items()}


def failing(nodes: list[Node], expected: Expected = EXPECTED) -> dict[str, tuple[str, ...]]:
    """The texts of what fails, and who."""
    return {finding.text: finding.nodes for finding in judge(nodes, expected) if finding.fails}


@pytest.mark.parametrize("count", [1, 2, 3, 16, 125])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_nothing_is_found_where_all_is_well(count: int, noise: float) -> None:
    nodes = good(count, noise)
    assert judge(nodes, EXPECTED) == []
    assert summary(nodes, [], EXPECTED).endswith("fit for this run")


@pytest.mark.parametrize("count", [2, 3, 16, 125])
def test_a_gpu_with_slow_memory_is_named(count: int) -> None:
    nodes = good(count, noise=0.02)
    nodes[1].values["copy"][8 + 3] *= 0.7
    ((text, names),) = failing(nodes).items()
    assert names == ("n2",)
    assert "device 3" in text and "1.7" in text


def test_two_slow_nodes_of_16_are_named() -> None:
    nodes = good(16, noise=0.1)
    slow_down(nodes[4], "inside", 0.4)
    slow_down(nodes[5], "inside", 0.3)
    assert sorted(failing(nodes).values()) == [("n5",), ("n6",)]


@pytest.mark.parametrize("count", [3, 4, 5, 16])
@pytest.mark.parametrize("position", [0, 1, -1])
def test_a_node_with_two_slow_links_is_named(count: int, position: int) -> None:
    nodes = good(count, noise=0.1)
    slow_down(nodes[position], "link", 0.1)
    slow_down(nodes[position - 1], "link", 0.1)
    ((text, names),) = failing(nodes).items()
    assert names == (nodes[position].name,)
    assert "network is slow" in text


def test_one_slow_link_is_named_by_its_ends() -> None:
    nodes = good(4)
    slow_down(nodes[3], "link", 0.1)
    assert list(failing(nodes).values()) == [("n4", "n1")]


def test_a_link_of_one_adapter_among_eight_counts() -> None:
    nodes = good(4)
    nodes[2].values["link"][2 * 8 + 5] *= 0.1
    assert list(failing(nodes).values()) == [("n3", "n4")]


def test_cpus_may_differ_more() -> None:
    nodes = good(4)
    slow_down(nodes[0], "copy", 0.5)
    slow_down(nodes[0], "link", 0.4)
    on_cpus = Expected(processes=2, gpus=0, checkpoint_bytes=GB, kept=3, notice=120)
    assert len(failing(nodes)) == 2
    assert failing(nodes, on_cpus) == {}


@pytest.mark.parametrize(("package", "fails"), [("torch", True), ("mf_train", True), ("kernel", False)])
def test_another_version_is_named(package: str, fails: bool) -> None:
    nodes = good(4)
    nodes[2].versions[package] = "other"
    (finding,) = judge(nodes, EXPECTED)
    assert (finding.nodes, finding.fails) == (("n3",), fails)
    assert "other" in finding.text and "3 others have" in finding.text


def test_a_package_that_one_node_lacks_is_found() -> None:
    nodes = good(3)
    del nodes[0].versions["torch"]
    assert failing(nodes) == {"torch: none; 2 others have 2.13.0": ("n1",)}


def test_of_two_different_nodes_none_is_right() -> None:
    nodes = good(2)
    nodes[1].versions["torch"] = "2.12.0"
    findings = judge(nodes, EXPECTED)
    assert [finding.nodes for finding in findings] == [("n1",), ("n2",)]
    assert summary(nodes, findings, EXPECTED).endswith("not fit for this run, for the reasons above")


def test_missing_gpus_space_files_and_clocks() -> None:
    nodes = good(4)
    nodes[0].gpus = 7
    nodes[1].resources["free"] = 35 * GB
    nodes[2].resources["open_files"] = 1 * 64
    nodes[3].values["skew"] = {24: -3.5}
    found = failing(nodes)
    assert found["sees 7 of 8 GPUs"] == ("n1",)
    assert found["not 36 GB free in the run's folder for 3 checkpoints"] == ("n2",)
    assert found["a process may open fewer than 320 files: raise `ulimit -n`"] == ("n3",)
    assert found["its clock is 3.5 s behind the first node's: look at its time service"] == ("n4",)
    assert len(found) == 4


def test_a_round_trip_excuses_a_clock() -> None:
    nodes = good(2)
    nodes[1].values |= {"skew": {8: 1.5}, "round_trip": {8: 2.0}}
    assert failing(nodes) == {}


def test_slow_storage_is_told_and_fails_where_a_checkpoint_takes_longer_than_the_notice() -> None:
    nodes = good(2)
    slow_down(nodes[1], "write", 0.2)  # 6 GB of each at 0.4 GB/s: 15 s
    (finding,) = judge(nodes, EXPECTED)
    assert (finding.nodes, finding.fails) == (("n2",), False)
    slow_down(nodes[1], "write", 0.1)
    (text,) = [text for text in failing(nodes)]
    assert "about 150 s" in text and "--notice 285 or more" in text


def test_only_the_lost_node_is_named() -> None:
    nodes = good(4)
    nodes[2].stage = "memory"
    for i in (0, 1, 3):
        nodes[i].stage, nodes[i].failed = "memory", ("storage", "TimeoutError: not all came")
    assert list(failing(nodes).values()) == [("n3",)]


def test_of_failures_the_cause_is_named_and_not_those_that_waited() -> None:
    nodes = good(3)
    nodes[1].stage, nodes[1].failed = "", ("node", "ImportError: no torch")
    for i in (0, 2):
        nodes[i].stage, nodes[i].failed = "node", ("met", "TimeoutError: not all came")
    assert failing(nodes) == {"in 'node': ImportError: no torch": ("n2",)}


def test_a_node_without_an_answer_is_named() -> None:
    nodes = collect(["n1", "n2"], ["n1"], [])
    assert ("n2",) in failing(nodes).values()


@pytest.mark.parametrize(
    ("seen", "expected"),
    [([8] * 8, 8), ([1] * 8, 8), ([8] * 7 + [7], 7), ([0] * 8, 0), ([1], 1), ([2, 2], 2), ([1] * 5, 5)],
    ids=["all", "one each", "one less", "none", "one", "two", "three silent"],
)
def test_gpus_are_counted_also_where_each_process_sees_its_own(seen: list[int], expected: int) -> None:
    lines = [{"rank": rank, "node": "n1", "stage": "node", "gpus": gpus} for rank, gpus in enumerate(seen)]
    (node,) = collect(["n1"], ["n1"], lines)
    assert node.gpus == expected


def test_collect_reads_what_processes_print() -> None:
    lines: list[dict[str, Any]] = [
        {"rank": 0, "node": "n1", "stage": "node", "versions": {"python": "3"}, "gpus": 2},
        {"rank": 0, "node": "n1", "stage": "memory", "copy": 9.0},
        {"rank": 1, "node": "n1", "stage": "memory", "copy": 8.0},
        {"rank": 0, "node": "n1", "stage": "done"},
        {"rank": 2, "node": "n2", "stage": "failed", "during": "storage", "error": "OSError: full"},
    ]
    first, second = collect(["n1", "n2"], ["n1", "n2"], lines)
    assert (first.stage, first.gpus, first.value("copy")) == ("memory", 2, 8.0)  # rank 1 is not done
    assert first.values["copy"] == {0: 9.0, 1: 8.0}
    assert second.failed == ("storage", "OSError: full")


@pytest.mark.parametrize("count", [2, 16, 125])
def test_the_table_is_narrow_and_short(count: int) -> None:
    nodes = good(count, noise=0.1)
    nodes[1].name = "a-long-name-of-a-node-0001"
    slow_down(nodes[1], "copy", 0.5)
    findings = judge(nodes, EXPECTED)
    text = table(nodes, findings) + "\n" + summary(nodes, findings, EXPECTED)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) < 32
    assert sum(line.startswith("! a-long-name-of-a-node-0001 ") for line in lines) == 1
    assert ("median" in text) == (count > 2)
    assert lines[-1] == "verdict: a-long-name-of-a-node-0001 stands out"


def test_a_table_of_nodes_that_said_nothing() -> None:
    nodes = [Node("n1", answers=False), Node("n2", answers=False)]
    findings = judge(nodes, EXPECTED)
    assert table(nodes, findings).count("-") >= 16
    assert findings == [Finding(("n1", "n2"), "no program could be started there in time")]
    assert "not fit" in summary(nodes, findings, EXPECTED)
