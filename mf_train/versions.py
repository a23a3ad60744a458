"""The versions that a run records and that a launch compares between nodes."""

import importlib.metadata
import platform

PACKAGES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "sentencepiece",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
    "triton",
)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
