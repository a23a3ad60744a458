"""Whether a training repeats on the device: two that are the same in all but the moment they run.

The project's kernels sum in a fixed order and repeat to the bit (test_kernels.py). Torch's attention need not: the
backward passes of its flash and memory-efficient kernels may add the blocks of a long sequence in any order, and the
trainer leaves that choice to torch. So a run as it is may differ from its repetition by rounding, which is measured
here and bounded; with attention by torch's math operations (`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`)
nothing is left that may differ, and not a bit does. On a CPU both repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu.device import device_or_skip, skip_without

DEVICE = device_or_skip()
skip_without("deepspeed", "megatron.core", *(["triton"] if DEVICE == "cuda" else []))

from tests.gpu.trainings import ATTENTIONS, PRECISIONS, Failure, Repeat, run_repeats  # noqa: E402
from tests.parallel.test_engine import largest_error, largest_relative  # noqa: E402

pytestmark = pytest.mark.distributed
# Of losses and norms, relative: as test_trainer.py measured noise.
ALLOWED = {"float32": (1e-3, 1e-2), "bfloat16": (6e-3, 1.5e-1)}
Found = dict[Any, Any]


@pytest.fixture(scope="module")
def repeats() -> Found:
    return run_repeats(DEVICE)


def pair_of(repeats: Found, precision: str, attention: str) -> list[Repeat]:
    pair = repeats[precision, attention]
    assert not isinstance(pair, Failure), pair.text
    first, second = pair
    assert first.losses[0] - first.losses[-1] > 0.05, f"the training learnt nothing: {first.losses}"
    return [first, second]


def different_bits(first: Repeat, second: Repeat) -> list[str]:
    """What is not equal to the bit."""
    steps = range(len(first.losses))
    found = [f"loss of step {i + 1}" for i in steps if first.losses[i] != second.losses[i]]
    found += [f"norm of step {i + 1}" for i in steps if first.norms[i] != second.norms[i]]
    return found + [
        name for name, value in first.masters.items() if not torch.equal(value, second.masters[name])
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_math_attention_a_run_repeats_to_the_bit(precision: str, repeats: Found) -> None:
    first, second = pair_of(repeats, precision, ATTENTIONS[1])
    different = different_bits(first, second)
    assert not different, f"{different}\n{first.losses}\n{second.losses}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_as_it_is_repeats_to_rounding(
    precision: str, repeats: Found, measured: Callable[[str, object], None]
) -> None:
    first, second = pair_of(repeats, precision, ATTENTIONS[0])
    different = different_bits(first, second)
    losses, norms = (
        largest_relative(second.losses, first.losses),
        largest_relative(second.norms, first.norms),
    )
    error, name = largest_error(second.masters, first.masters)
    first_bit = f"{different[0]} first" if different else "nothing"
    found = f"differs: {first_bit}; losses {losses:.1e}, norms {norms:.1e}, masters {error:.1e} ({name})"
    measured("two runs", found)
    assert first.losses[0] == second.losses[0], (
        "the first forward pass does not repeat: a kernel of ours or the matmuls"
    )
    allowed = ALLOWED[precision]
    assert losses <= allowed[0] and norms <= allowed[1], f"{found}; allowed {allowed}"
    if DEVICE == "cpu":
        assert not different
