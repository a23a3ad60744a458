"""Wheels that hold the C++ operation compiled, for machines without a compiler: `make wheel`, of a checkout.

One for x86-64, with AVX2 and AVX-512, and one for aarch64, with NEON, where there is a compiler for it
(`apt-get install g++-aarch64-linux-gnu`). What they need is glibc 2.17 and torch; for any other machine the sources,
which every wheel has, compile at first use.
"""

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import cpu
from .build import PREBUILT, BuildError, compile_library, file_name

PACKAGE = Path(__file__).parents[1]
BESIDE = ("pyproject.toml", "README.md", "LICENSE")  # what a wheel is made of, beside the package
MACHINES = {"x86_64": ("avx2", "avx512"), "aarch64": ("neon",)}
GLIBC = (2, 17)  # the oldest that they run with, as the tag manylinux_2_17 says


def tool(machine: str, name: str) -> str:
    """The compiler, or another of its tools, that makes programs for a machine."""
    return name if machine == platform.machine() else f"{machine}-linux-gnu-{name}"


def newest_glibc(library: Path, machine: str) -> tuple[int, ...]:
    """The version of glibc that a library needs."""
    command = [tool(machine, "objdump"), "-T", str(library)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(tuple(map(int, version.split("."))) for version in re.findall(r"\(GLIBC_([0-9.]+)\)", symbols))


def libraries_for(machine: str) -> list[Path]:
    """Every library of a machine, named as the loader looks for it, in build/. Raises BuildError."""
    folder = PACKAGE.parent / "build" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for instruction_set in MACHINES[machine]:
        library = folder / file_name(*cpu.recipe(instruction_set), machine)
        if not library.is_file():
            print(f"compiling {library.name} for {machine}", flush=True)
            compile_library(library, cpu.commands(instruction_set, tool(machine, "g++"), ["-DMF_OLD_GLIBC"]))
        if (needed := newest_glibc(library, machine)) > GLIBC:
            needed_words, words = (".".join(map(str, version)) for version in (needed, GLIBC))
            raise BuildError(f"{library} needs glibc {needed_words}, and wheels are for {words}")
        found.append(library)
    return found


def make_wheel(output: Path, machine: str) -> Path:
    """A wheel for a machine, in a folder. Raises BuildError where it cannot be made."""
    libraries = libraries_for(machine)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        ignored = shutil.ignore_patterns("__pycache__", PREBUILT.name)
        shutil.copytree(PACKAGE, tree / PACKAGE.name, ignore=ignored)
        for name in BESIDE:
            shutil.copy(PACKAGE.parent / name, tree)
        compiled = tree / PREBUILT.relative_to(PACKAGE.parent)
        compiled.mkdir()
        for library in libraries:
            shutil.copy(library, compiled)
        tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            str(tree),
            "--wheel-dir",
            str(Path(scratch) / "made"),
        ]
        command += ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
        command += [f"--config-settings=--build-option=--plat-name={tag}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"pip could not make the wheel: {(done.stderr or done.stdout).strip()}")
        (made,) = (Path(scratch) / "made").glob("*.whl")
        output.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(made, output / made.name))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mf_train.kernels.wheel", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--machines", nargs="+", choices=MACHINES, help="default: all that there is a compiler for"
    )
    options = parser.parse_args()
    if missing := [name for name in BESIDE if not (PACKAGE.parent / name).is_file()]:
        parser.error(f"{PACKAGE.parent} has no {missing[0]}: run this in a checkout")
    for machine in options.machines or MACHINES:
        if not options.machines and shutil.which(tool(machine, "g++")) is None:
            print(f"no wheel for {machine}: there is no {tool(machine, 'g++')}")
            continue
        try:
            print(make_wheel(options.output, machine))
        except BuildError as error:
            print(f"no wheel for {machine}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
