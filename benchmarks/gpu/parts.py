"""The parts of `make gpu`, most valuable first."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

# Import names, and what pip calls them. The trainer reads token shards here, which need no sentencepiece.
KERNELS = {"torch": "torch", "triton": "triton"}
TRAINER = KERNELS | {
    "numpy": "numpy",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "deepspeed": "deepspeed",
    "megatron.core": "megatron-core",
}
OPTIONAL = {
    "datasets": "datasets",
    "sentencepiece": "sentencepiece",
    "transformers": "transformers",
    "pytest": "pytest",
}


@dataclass(frozen=True)
class Part:
    """One process, `python -m MODULE ARGUMENTS`, and how long it may take.

    seconds: what it is expected to take on one data-centre GPU, compiling included. limit: when it is ended.
    step_limit: when it is ended because its current step takes so long; the steps behind it then run in a new process.
    """

    name: str
    about: str
    module: str
    seconds: int
    limit: int
    step_limit: int
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # import names; where one is missing the part is not run

    def missing(self) -> list[str]:
        """What pip calls the packages that this part needs and that are not installed."""
        names = TRAINER | OPTIONAL
        return [names[name] for name in self.needs if not is_installed(name)]


def is_installed(name: str) -> bool:
    """Whether a package can be found; nothing of it but the packages around it is imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # of the package around it
        return False


def missing_packages() -> list[str]:
    """What pip calls every package that some part needs, or is less without, and that is not installed."""
    return [pip for name, pip in (TRAINER | OPTIONAL).items() if not is_installed(name)]


_TESTS = "benchmarks.gpu.tests"
PARTS = (
    Part(
        "kernels",
        "tests: every kernel against float64, gradients included",
        _TESTS,
        seconds=70,
        limit=150,
        step_limit=60,
        arguments=("tests/gpu/test_kernels.py", "tests/gpu/test_cuda.py"),
        needs=("triton", "pytest"),
    ),
    Part(
        "trainer",
        "tests: ZeRO stages against plain torch, resume, telemetry, documents, conversion, two equal runs",
        _TESTS,
        seconds=130,
        limit=210,
        step_limit=120,
        arguments=tuple(f"tests/gpu/test_{name}.py" for name in ("model", "run", "trainer", "repeats")),
        needs=("pytest",),
    ),
    Part(
        "rates",
        "bytes a second of copies and of gathers from each level of memory, products, launches: the device file",
        "benchmarks.gpu.rates",
        seconds=25,
        limit=60,
        step_limit=30,
        needs=tuple(KERNELS),
    ),
    Part(
        "lookup",
        "hash, lookup, norm, loss and rotation, forward and backward, beside what torch has for each, in ns a token",
        "benchmarks.gpu.lookup",
        seconds=64,
        limit=120,
        step_limit=60,
        needs=tuple(KERNELS),
    ),
    Part(
        "training",
        "tokens/s, memory and a profile by part: tiny, small and their dense peers in the trainer",
        "benchmarks.gpu.training",
        seconds=140,
        limit=240,
        step_limit=100,
        needs=tuple(TRAINER),
    ),
    Part(
        "decoding",
        "tokens/s of tiny and base beside GPT-NeoX of their peers' shapes",
        "benchmarks.gpu.decoding",
        seconds=50,
        limit=100,
        step_limit=60,
        needs=(*KERNELS, "transformers", "numpy", "yaml", "safetensors"),
    ),
)
