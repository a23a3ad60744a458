"""Every command of the documents runs, on small stand-ins, or says beside it what it needs that is not here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
import zstandard

from tests.training.runs import REPOSITORY, environment, write_text
from tests.warm import Running

PAGES = [
    path for pattern in ("*.md", "docs/*.md", "launch/*.md") for path in sorted(REPOSITORY.glob(pattern))
]
PROGRAMS = (
    *("apptainer", "benchmarks/gpu/wheels.sh", "cd", "cp", "docker", "enroot", "git", "lm_eval", "make"),
    *(
        "curl",
        "hf",
        "memoryformer",
        "pip",
        "python3",
        "sbatch",
        "srun",
        "tensorboard",
        "torchrun",
        "transformers",
    ),
)
PYTHON = ("from", "import")  # which some machines have as programs, too
RUNS = ("memoryformer", "torchrun", "lm_eval", "cp")  # unless a pattern of NOT_RUN says else


@dataclass(frozen=True)
class Reason:
    """Why commands are not run, and a word of it that stands in them, their comment, section or page's title."""

    name: str
    pattern: str
    word: str
    dry: bool = False  # they run with --dry-run


NOT_RUN = (
    Reason(
        "cluster", r"launch (status|logs|stop|--check)|--parsable|\b(srun|sbatch) ", "cluster|SLURM|Clusters"
    ),
    Reason("cluster, dry run here", r"memoryformer launch|--slurm", "cluster|SLURM|Clusters", dry=True),
    Reason("GPUs", r"^torchrun --nproc-per-node 8|make gpu", "GPU"),
    Reason("hub", r"--tasks pythia_six|^hf |--upload (?!.*--dry-run)", "hub"),
    Reason(
        "installation", r"^(pip|python3 -m pip|git clone|make setup|docker|enroot|apptainer|.*wheels.sh)", ""
    ),
    Reason("a test of its own", r"^make quickstart|memoryformer quickstart", ""),  # tests/quickstart
    Reason("the tests", r"^make test", ""),
    Reason("serves until it is ended", r"^tensorboard |^transformers serve ", "live|server"),
    Reason("needs what serves", r"^(transformers chat|curl) ", "server|serve"),  # use/test_serving.py
)


@dataclass(frozen=True)
class Command:
    """A command of a page, as a shell would get it, and what a reader sees about it."""

    place: str
    text: str
    said: str

    @property
    def reason(self) -> Reason | None:
        found = (reason for reason in NOT_RUN if re.search(reason.pattern, self.text))
        return next(found, None)


def commands(name: str, page: str) -> list[Command]:
    """Those of the indented blocks that begin with a program's name, be it one of this machine."""
    fences = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    page = fences.sub(lambda block: "\n" * block[0].count("\n"), page)
    title, section, found = "", "", []
    before, is_shell, whole = "", False, ""
    for number, line in enumerate(page.splitlines(), start=1):
        if line.startswith("#"):
            title, section = title or line, ""
        if not line.startswith("    "):
            section += line + "\n"
            is_shell = False
        else:
            if not before.strip():
                program = re.sub(r"^(\w+=\S+ |\w+=\$\()*", "", line.strip()).split()[0]
                known = shutil.which(program) is not None and program not in PYTHON
                is_shell = program in PROGRAMS or known
            if is_shell:
                whole += line.strip().removesuffix("\\")
                if not line.endswith("\\"):
                    text, _, comment = re.sub(r"\s+", " ", whole).partition(" # ")
                    text = re.sub(r"^\w+=\$\((.*)\)$", r"\1", text.strip())
                    found.append(Command(f"{name}:{number}", text, f"{title}\n{section}\n{comment}"))
                    whole = ""
        before = line
    return found


def complaints(command: Command) -> list[str]:
    """What is wrong with how a command is kept true."""
    reason = command.reason
    if reason is None:
        program = re.sub(r"^(\w+=\S+ )*", "", command.text).split()[0]
        return [] if program in RUNS else [f"{command.place}: neither run nor of a kind that cannot be"]
    if re.search(reason.word, command.said + command.text):
        return []
    return [f"{command.place}: needs {reason.name}: say {reason.word} beside it, in its section or the title"]


FOUND = {
    name: commands(name, page.read_text(encoding="utf-8"))
    for page in PAGES
    for name in [str(page.relative_to(REPOSITORY))]
}
ALL = [command for found in FOUND.values() for command in found]


def test_every_command_is_run_or_says_what_it_needs() -> None:
    assert len(ALL) > 90
    assert [complaint for command in ALL for complaint in complaints(command)] == []


def test_a_command_that_nothing_is_said_of_is_found() -> None:
    block = "# A page\n\nWords.\n\n    memoryformer launch stop RUN{}\n    git \\\n        log{}\n\nWords.\n\n    ls\n"
    assert [command.text for command in commands("a", block.format("", ""))] == [
        "memoryformer launch stop RUN",
        "git log",
        "ls",
    ]
    places = [
        complaint.partition(": ")[0]
        for comment in ("", "  # on the cluster")
        for command in commands("a", block.format(comment, comment))
        for complaint in complaints(command)
    ]
    assert places == ["a:5", "a:7", "a:11", "a:7", "a:11"]


# words of the documents that stand for others
STAND_INS = {
    "...": ["--gpus-per-node", "8"],
    "KEYS": ["training.recompute=block"],
    "CONFIG": ["configs/quickstart.yaml", "parallel.tensor=1"],
    "RUN": ["runs/tiny"],
    "140000": ["3"],  # the steps of the small run's checkpoints
    "141000": ["6"],
    "142000": ["9"],
    "143000": ["12"],
}
# what they name and no command of their page has written: copies of a small run and of its model
RUN_NAMES = ("runs/quickstart", "runs/base", "runs/tiny")
MODELS = {"MODEL": r"(evaluate |=)MODEL\b", "tuned": r" tuned\b"}
# nothing is trained, so these run on the configurations themselves
FULL_SIZE = ("plan", "launch", "--slurm")
SMALL_MODEL = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "bits": 4, "expand_bits": 1}
SMALL_STUDY = {"flops": [2e9], "tokens": [4096], "size": {"depths": [1], "width": 32, "head_size": 8}}


def shrink(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration of seconds: its paths, ranks, precision, vocabulary and rate stay."""
    sequence = min(128, tree["model"]["sequence_length"])
    tree["model"] |= {**SMALL_MODEL, "sequence_length": sequence}
    tree["schedule"] = {"warmup_steps": 1}
    tree["training"] |= {
        "steps": 12,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "device": "cpu",
        "validation_interval": 2,
        "validation_sequences": 4,
        "average_decay": 0.5,
    }
    tree["checkpoint"] = {"interval": 3, "keep": 4}
    tree["logging"] = {"interval": 1, "telemetry_interval": 2}
    return tree


def shrink_study(tree: dict[str, Any]) -> dict[str, Any]:
    """The first value of each axis, at a few steps of a small model."""
    tree["settings"] = {
        key: value
        for key, value in tree["settings"].items()
        if not key.startswith(("model.", "training.steps", "schedule."))
    }
    axes = {axis: SMALL_STUDY.get(axis) or values[:1] for axis, values in tree["axes"].items()}
    tree["axes"] = axes if set(axes) & {"flops", "tokens"} else {**axes, "tokens": SMALL_STUDY["tokens"]}
    return tree


class Folder:
    """What looks like the repository's top, with small configurations and texts; `full` has the real ones."""

    def __init__(self, path: Path, made: Path) -> None:
        self.path, self.made, self.full = path, made, path.with_name("full")
        path.mkdir()
        (self.full / "runs").mkdir(parents=True)
        (self.full / "configs").symlink_to(REPOSITORY / "configs")
        (path / "tokenizer").symlink_to(REPOSITORY / "tokenizer")
        (path / "docs").mkdir()
        (path / "configs/studies").mkdir(parents=True)
        (path / "configs/quickstart-text").symlink_to(REPOSITORY / "configs/quickstart-text")
        shutil.copytree(REPOSITORY / "configs/eval", path / "configs/eval")
        for items in (path / "configs/eval/tasks").glob("*.jsonl"):
            items.write_text("".join(items.read_text().splitlines(keepends=True)[:10]))
        for config in (REPOSITORY / "configs").glob("*.yaml"):
            self.write(f"configs/{config.name}", shrink(yaml.safe_load(config.read_text())))
        for study in (REPOSITORY / "configs/studies").glob("*-small.yaml"):
            self.write(f"configs/studies/{study.name}", shrink_study(yaml.safe_load(study.read_text())))
        for name in ("data/train", "data/validation", "held-out"):
            (path / name).mkdir(parents=True)
        text = write_text(path / "held-out/a.jsonl", documents=60).read_bytes()
        for name in ("train", "validation"):
            (path / "data" / name / "a.jsonl.zst").write_bytes(zstandard.compress(text))
        (path / "data/tokenizer").symlink_to(REPOSITORY / "tokenizer")

    def write(self, name: str, tree: dict[str, Any]) -> None:
        (self.path / name).write_text(yaml.safe_dump(tree, sort_keys=False))

    def provide(self, text: str) -> None:
        """What a command names, where none before it has written that."""
        for name in RUN_NAMES:
            made = self.made / "runs/quickstart"
            if re.search(rf" {name}\b", text) and made.exists() and not (self.path / name).exists():
                shutil.copytree(made, self.path / name)
        for name, pattern in MODELS.items():
            if re.search(pattern, text) and not (self.path / name).exists():
                shutil.copytree(self.made / "model", self.path / name)
        if re.search(r"(--input |path: )corpus/\*", text):
            (self.path / "corpus").mkdir(exist_ok=True)
            for file in (REPOSITORY / "configs/quickstart-text/train").glob("*.gz"):
                if not (self.path / "corpus" / file.name).exists():
                    (self.path / "corpus" / file.name).symlink_to(file)
        if "pile/" in text:
            (self.path / "pile").mkdir(exist_ok=True)
            for name in ("pile_text_document", "held_out_document"):
                for kind in (".bin", ".idx"):
                    shards = next((self.made / "shards").rglob(f"*{kind}"))
                    shutil.copy(shards, self.path / f"pile/{name}{kind}")

    def run(self, text: str) -> None:
        """A command, as in a shell: with status 0 and no traceback."""
        text = text.replace("$PWD", str(self.path)).replace("$first", "1")
        words = [other for word in shlex.split(text) for other in STAND_INS.get(word, [word])]
        variables = environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, variables[name] = words.pop(0).partition("=")
        self.provide(f" {' '.join(words)}")
        folder = self.full if set(words) & set(FULL_SIZE) else self.path
        if folder == self.full:
            for entry in self.path.iterdir():
                if not (self.full / entry.name).exists():
                    (self.full / entry.name).symlink_to(entry)
        began = time.monotonic()
        if words[0] in ("memoryformer", "torchrun"):  # torchrun --nproc-per-node N -m mf_train ...
            several = words[0] == "torchrun"
            running = Running(
                words[5 if several else 1 :], variables, folder, int(words[2]) if several else 1
            )
            out, errors = running.communicate(timeout=120)
            status = running.poll()
        else:
            done = subprocess.run(
                words, cwd=folder, env=variables, capture_output=True, text=True, timeout=120
            )
            out, errors, status = done.stdout, done.stderr, done.returncode
        print(f"{time.monotonic() - began:6.1f} s  {shlex.join(words)}")
        fine = status == 0 and "Traceback" not in out + errors
        assert fine, f"{shlex.join(words)}: status {status}\n{out}\n{errors}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with its checkpoints, the model that it converts to, and token shards."""
    path = tmp_path_factory.mktemp("commands") / "made"
    folder = Folder(path, path)
    folder.run("memoryformer train configs/quickstart.yaml parallel.tensor=1")
    folder.run("memoryformer convert runs/quickstart model")
    folder.run("memoryformer data tokenize configs/tiny.yaml --output shards")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, found in FOUND.items() if found])
def test_commands_run(page: str, made: Path, tmp_path: Path) -> None:
    """One after another, as a reader would give them, in a folder that looks like the repository's."""
    folder = Folder(tmp_path / "top", made)
    if page == "docs/tutorial.md":
        (config,) = re.findall(
            r"^```yaml\n(.*?)^```$", (REPOSITORY / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
        folder.write("my.yaml", shrink(yaml.safe_load(config)))
        (folder.full / "my.yaml").write_text(config)
    failed = []
    for command in FOUND[page]:
        reason = command.reason
        if reason is None or reason.dry:
            try:
                folder.run(command.text + " --dry-run" * (reason is not None))
            except AssertionError as error:
                failed.append(f"{command.place}: {error}")
    assert not failed, "\n\n".join(failed)
