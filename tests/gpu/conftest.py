"""Fixtures of the tests that are for a GPU, and the list of what they measured at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

# their assertions say what they compared, as those of test files do
pytest.register_assert_rewrite("tests.kernels.triton_cases", "tests.kernels.test_cuda")

_MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture
def measured(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[[str, object], None]:
    """`measured(name, value)`: kept in the JUnit file and shown at the end of the run, also of a test that passes."""

    def keep(name: str, value: object) -> None:
        record_property(name, value)
        request.config.stash.setdefault(_MEASURED, []).append(f"{request.node.name}: {name}: {value}")

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(_MEASURED, []):
        terminalreporter.section("measured on the device")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def settled_device() -> Iterator[None]:
    """On a GPU: what a test left running fails that test and no later one; its memory is given back.

    A kernel that reads outside its memory costs this process its CUDA context. Later tests then say so.
    """
    if not torch.cuda.is_available():
        yield
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.fail(f"an earlier test lost this process's CUDA context ({error}): run this test alone")
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
