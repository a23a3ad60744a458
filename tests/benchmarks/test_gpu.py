"""`python -m benchmarks.gpu` without a GPU: what is kept of parts that fail, hang and crash, and its rehearsal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import look, report
from benchmarks.gpu.__main__ import describe as describe_machine
from benchmarks.gpu.device import TimedDevice
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.runner import PartResult, Runner
from benchmarks.gpu.steps import describe
from mf_train.run_folder import read_records
from tests.training.runs import REPOSITORY, environment


def part(*steps: str, name: str = "a part", limit: int = 60, step_limit: int = 60, **settings: Any) -> Part:
    module = settings.pop("module", "tests.benchmarks.a_part")
    return Part(name, "", module, 1, limit, step_limit, arguments=steps, **settings)


def runner(folder: Path, seconds: float = 60, **settings: Any) -> Runner:
    return Runner(folder, time.monotonic() + seconds, **settings)


def by_step(outcome: PartResult) -> dict[str, str]:
    """Of each step its error, or "" where it has values."""
    return {step["step"]: step.get("error", "") for step in outcome.steps}


def test_steps_that_fail_crash_and_hang_take_nothing_from_the_others(tmp_path: Path) -> None:
    names = "fine-1 fail partly memory fine-2 crash fine-3 lost hang fine-4 leave fine-5".split()
    outcome = runner(tmp_path).run(part(*names, step_limit=4))
    found = by_step(outcome)
    assert list(found) == list(names)
    assert [name for name in names if found[name] == ""] == [f"fine-{number}" for number in range(1, 6)]
    assert found["fail"] == "ValueError: a wrong number"
    assert found["partly"] == "second: a wrong number" and outcome.steps[2]["values"] == {"first": 1}
    assert found["memory"] == "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB"
    assert found["crash"] == "crashed (SIGSEGV)"
    assert found["lost"] == "an error of CUDA, after which its process could not go on"
    assert found["hang"] == "hung: nothing for 4 s"
    assert found["leave"] == "ended with status 9: the last words"
    assert outcome.failed and outcome.reason == "" and outcome.starts == 5
    assert outcome.steps[0]["values"] == {"number": len("fine-1")}
    log = (tmp_path / "output.log").read_text()
    assert "time.sleep" in log or "in do" in log  # where the step that hung stood


def test_parts_that_fail_hang_and_crash_leave_the_others_whole(tmp_path: Path) -> None:
    run = runner(tmp_path)
    parts = [
        part("fine", name="first"),
        part("fail", name="fails"),
        part("fine", "hang", name="hangs", limit=4),
        part("crash", name="crashes"),
        part("broken", name="broken"),
        part("fine", "fine-too", name="last"),
    ]
    outcomes = {one.name: run.run(one) for one in parts}
    assert [name for name, outcome in outcomes.items() if not outcome.failed] == ["first", "last"]
    assert by_step(outcomes["last"]) == {"fine": "", "fine-too": ""}
    assert outcomes["hangs"].reason == "ended at its limit of 4 s, with steps left"
    assert by_step(outcomes["hangs"]) == {"fine": "", "hang": "stopped at its part's limit"}
    assert by_step(outcomes["crashes"]) == {"crash": "crashed (SIGSEGV)"}
    assert outcomes["broken"].reason == "ended with status 1: ImportError: a library is broken"
    table = report.short_table(list(outcomes.values()))
    assert [line.split()[0] for line in table.splitlines()] == list(outcomes)
    failures = report.failures(list(outcomes.values()))
    assert "fails: fail: ValueError: a wrong number" in failures and len(failures) == 5
    assert not list(tmp_path.glob(".*"))  # nothing but the log is left


def test_a_part_that_is_not_run_says_why(tmp_path: Path) -> None:
    assert runner(tmp_path, seconds=0.5).run(part("fine")).reason == (
        "not run: no time was left; --only a part runs it alone"
    )
    run = runner(tmp_path, device_answers=lambda: False)
    outcome = run.run(part("crash", "fine", name="first"))
    assert outcome.reason == "crashed (SIGSEGV); then the device did not answer"
    assert by_step(outcome) == {"crash": "crashed (SIGSEGV)"}
    after = run.run(part("fine"))
    assert after.reason == "not run: the device did not answer after part first" and not after.steps
    assert "not run" in report.short_table([after])


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    missing = ("deepspeed", "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    outcome = runner(tmp_path).run(part("fine", needs=("torch", "triton", "deepspeed")))
    assert outcome.reason == "not run: triton, deepspeed are not installed"


def test_what_a_part_started_ends_with_it(tmp_path: Path) -> None:
    runner(tmp_path).run(part("child", limit=3))
    number = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not Path(f"/proc/{number}").exists() or "Z" in Path(f"/proc/{number}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    pytest.fail(f"process {number} is still there")


def test_errors_take_one_line() -> None:
    assert describe(ValueError("two\nlines")) == "ValueError: two lines"
    assert len(describe(RuntimeError("x" * 1000))) == 400


def test_too_little_memory_is_said_with_the_numbers() -> None:
    device = TimedDevice(rehearse=True)
    device.require(2**20, "a small layer")
    words = r"too little memory: a layer needs 1000\.0 GB, and 8\.6 GB are free"
    with pytest.raises(RuntimeError, match=words):
        device.require(1e12, "a layer")


def test_half_a_line_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "results"
    path.write_text('{"step": "a", "seconds": 1.0, "values": {}}\n{"step": "b", "sec')
    assert [line["step"] for line in read_records(path)] == ["a"]
    assert read_records(tmp_path / "none") == []


# ---------------------------------------------------------------- tests as steps

TESTS = """
import os, signal, time, pytest
def test_passes(record_property): record_property("ratio", 0.5)
def test_fails(): assert 1 == 2
@pytest.mark.parametrize("case", [1, 2])
def test_is_skipped(case): pytest.skip("no second GPU")
def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def test_hangs(): time.sleep(600)
@pytest.fixture
def broken(): raise OSError("no fixture")
def test_has_a_broken_fixture(broken): pass
def test_passes_too(): pass
"""


def test_every_test_is_a_step(tmp_path: Path) -> None:
    file = tmp_path / "test_steps.py"
    file.write_text(TESTS)
    broken = tmp_path / "test_broken.py"
    broken.write_text("import no_such_module")
    options = (f"--rootdir={tmp_path}", "-c", str(REPOSITORY / "pyproject.toml"))
    tests = part(str(file), *options, module="benchmarks.gpu.tests", step_limit=15)
    outcome = runner(tmp_path, 120).run(tests)
    found = {step["step"].split("::")[-1]: step for step in outcome.steps}
    assert found["test_passes"]["values"] == {"ratio": 0.5}
    assert found["test_fails"]["error"] == "call: assert 1 == 2"
    assert found["test_is_skipped[1]"]["skipped"] == found["test_is_skipped[2]"]["skipped"] == "no second GPU"
    assert found["test_crashes"]["error"] == "crashed (SIGSEGV)"
    assert found["test_hangs"]["error"] == "hung: nothing for 15 s"
    assert found["test_has_a_broken_fixture"]["error"] == "setup: OSError: no fixture"
    assert "values" in found["test_passes_too"]
    assert outcome.starts == 3 and not outcome.reason
    assert report.short_table([outcome]).endswith("2 passed, 2 skipped")

    outcome = runner(tmp_path).run(part(str(broken), *options, module="benchmarks.gpu.tests"))
    [step] = outcome.steps
    assert "no_such_module" in step["error"]


# ---------------------------------------------------------------- what is looked for


def test_what_keeps_a_gpu_from_computing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    too_old = "The NVIDIA driver on your system is too old (found version 11040)."

    def fail() -> None:
        raise RuntimeError(f"{too_old}\nPlease update it")

    monkeypatch.setattr(torch.version, "cuda", None)
    no_cuda = f"torch {torch.__version__} is built without CUDA: install its CUDA build"
    assert look.find_device() == (None, no_cuda)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", fail)
    assert look.find_device() == (None, too_old)


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.look"], cwd=REPOSITORY, capture_output=True, text=True
    )
    machine = json.loads(found.stdout)
    assert "has no C compiler (gcc or clang), which Triton needs" in machine["compiler"]
    assert "this machine has no C compiler" in describe_machine(machine, rehearse=False)


# ---------------------------------------------------------------- the command


def arguments(*given: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", *map(str, given)]


def command(*given: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments(*given), cwd=REPOSITORY, env=environment() | variables, capture_output=True, text=True
    )


def test_dry_prints_each_part_with_its_time() -> None:
    done = command("--dry")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    for expected in PARTS:
        [line] = [line for line in lines if line.startswith(f"{expected.name} ")]
        assert line.split()[1:4] == [str(n) for n in (expected.seconds, expected.limit, expected.step_limit)]
    assert f"{sum(one.seconds for one in PARTS)} s expected in all, 480 s allowed" in done.stdout
    assert sum(one.seconds for one in PARTS) <= 480
    assert len(command("--dry", "--only", "rates").stdout.splitlines()) == 3


def test_wrong_arguments_are_one_line() -> None:
    for given in (["--only", "nothing"], ["--minutes", "0"]):
        done = command(*given)
        assert done.returncode == 2 and "error: " in done.stderr.splitlines()[-1]


def test_without_a_gpu_every_part_says_so(tmp_path: Path) -> None:
    done = command("--output", tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1, done.stderr
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    problem = tree["machine"]["problem"]
    assert problem and "\n" not in problem
    assert [one["name"] for one in tree["parts"]] == [one.name for one in PARTS]
    assert {one["reason"] for one in tree["parts"]} == {f"not run: {problem}"}
    assert f"nothing can run: {problem}" in done.stdout
    table = done.stdout.splitlines()[-len(PARTS) :]
    assert all(
        line.startswith(one.name) and "not run" in line for line, one in zip(table, PARTS, strict=True)
    )
    assert (tmp_path / "out" / "table.txt").read_text().splitlines()[-1] == table[-1]


def test_a_signal_ends_it_with_what_was_found(tmp_path: Path) -> None:
    given = arguments("--rehearse", "--only", "rates", "lookup", "--output", tmp_path)
    process = subprocess.Popen(given, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    results = tmp_path / ".lookup.jsonl"
    for _ in range(1200):
        if results.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    rates, lookup = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert not rates["failed"] and any(step["step"] == "copy" for step in rates["steps"])
    assert lookup["reason"] == "stopped by a signal"
    assert output.splitlines()[-1].startswith("lookup ")


@pytest.mark.slow
def test_rehearsal_goes_through(tmp_path: Path) -> None:
    done = command("--rehearse", "--output", tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + (tmp_path / "output.log").read_text()[-6000:]
    tree = json.loads((tmp_path / "results.json").read_text())
    assert tree["rehearsal"] and not any(one["failed"] for one in tree["parts"])
    values = {
        one["name"]: report.values_of(PartResult(one["name"], steps=one["steps"])) for one in tree["parts"]
    }
    assert set(values["training"]) == {"tiny", "dense-tiny", "small", "dense-small"}
    assert set(values["decoding"]) == {"tiny", "base"}
    assert values["rates"]["device file"]["measured"] == "copy, flops, gather, launch"
    for name in values["training"]:
        assert (tmp_path / f"{name}.trace.json.gz").is_file()
