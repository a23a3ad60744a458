"""The contents of a checkpoint folder, and the manifest that describes it.

    step-000000200/
      manifest.json                            format, step, degrees, every parameter's global shape, every file's size
                                               and CRC-32, and at last its own
      state.json                               the training state beside the tensors: step, tokens, stream
      config.yaml                              the resolved configuration
      tokenizer.model or tokenizer.json        absent where the run had only token ids
      tokenizer_config.json, chat_template.jinja      where they lay beside it
      probe.safetensors                        tokens, and the trainer's logits and codes on them
      weights-0-of-2-part-000.safetensors      float32 master weights of tensor-parallel rank 0 of 2
      exp_avg-..., exp_avg_sq-...              AdamW's moments, laid out the same; absent where they are zero
      average-...                              the weights' average, where the run keeps one: then this is format 3

Each tensor is a tensor-parallel slice of a parameter under the parameter's name. The data-parallel degree and the
ZeRO stage leave no trace: a part is as many parameters, in the model's order, as fit into `PART_BYTES`.

DeepSpeed's own formats are not used: see docs/checkpoints.md for what its universal checkpoints did when tried.
"""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mf_train.errors import UserError
from mf_train.parallel.kinds import AVERAGE as AVERAGE
from mf_train.parallel.kinds import KINDS as KINDS
from mf_train.run_folder import CHECKPOINTS
from mf_train.run_folder import TOKENIZER as TOKENIZER

FORMAT, FORMAT_WITH_AVERAGE = 2, 3  # versions that know no average refuse the latter by its number
MANIFEST, STATE, CONFIG, PROBE = ("manifest.json", "state.json", "config.yaml", "probe.safetensors")
LATEST = "latest"
PART_BYTES = 4 << 30
_STEP = re.compile(r"step-(\d{9})")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC-32 of a file of a checkpoint."""

    size: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json. `parameters` maps a name to its global shape, `parts` to the part that holds it."""

    format: int
    step: int
    tensor_parallel: int
    kinds: tuple[str, ...]  # KINDS, these and AVERAGE, or only "master" where the moments are zero
    parameters: dict[str, tuple[int, ...]]
    parts: dict[str, int]
    files: dict[str, FileRecord]

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"crc32": self.checksum()}, indent=1) + "\n"

    def checksum(self) -> int:
        """CRC-32 of everything in it, so that a flipped bit of the manifest shows too."""
        return _checksum(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """Raises ValueError, KeyError or TypeError for anything but what `to_json` writes."""
        tree: dict[str, Any] = json.loads(text)
        checksum = tree.pop("crc32")
        tree["kinds"] = tuple(tree["kinds"])
        tree["parameters"] = {name: tuple(shape) for name, shape in tree["parameters"].items()}
        tree["files"] = {name: FileRecord(**record) for name, record in tree["files"].items()}
        for name, record in tree["files"].items():
            if Path(name).name != name or type(record.size) is not int or record.size < 0:
                raise ValueError(f"{name!r} is not a file of a checkpoint")
        manifest = Manifest(**tree)
        if checksum != manifest.checksum():
            raise ValueError("its own checksum differs")
        return manifest


def _checksum(tree: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(tree, sort_keys=True).encode())


def format_of(kinds: Sequence[str]) -> int:
    """The format of a checkpoint that holds these kinds."""
    return FORMAT_WITH_AVERAGE if AVERAGE in kinds else FORMAT


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:09d}"


def part_name(kind: str, tensor_rank: int, tensor_size: int, part: int) -> str:
    """File name of a part; `kind` is one of KINDS, or AVERAGE."""
    prefix = "weights" if kind == "master" else kind
    return f"{prefix}-{tensor_rank}-of-{tensor_size}-part-{part:03d}.safetensors"


def assign_parts(sizes: Mapping[str, int], part_bytes: int = PART_BYTES) -> dict[str, int]:
    """Part of each tensor from its size in bytes: in order, a new part where the next would not fit."""
    parts, part, filled = {}, 0, 0
    for name, size in sizes.items():
        if filled and filled + size > part_bytes:
            part, filled = part + 1, 0
        parts[name] = part
        filled += size
    return parts


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a `checkpoints/` folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir())


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, a `latest` file, or a run's or its checkpoints' newest.

    Raises UserError.
    """
    if path.name == LATEST and path.is_file():
        return resolve_checkpoint(path.parent)
    if (path / MANIFEST).is_file():
        return path
    for folder in (path, path / CHECKPOINTS):
        if found := list_checkpoints(folder):
            return found[-1]
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    raise UserError(f"{path}: holds no complete checkpoint (a folder step-... with {MANIFEST})")


class DamageError(UserError):
    """A checkpoint is not as it was written: `file` is missing, of another size or of other contents."""

    def __init__(self, file: Path, damage: str) -> None:
        super().__init__(f"{file}: {damage}; use another checkpoint")
        self.file = file
        self.damage = damage


def read_manifest(checkpoint: Path, *, check_sizes: bool = True) -> Manifest:
    """The manifest, and unless told otherwise a check that every file is there with its size.

    Raises DamageError, UserError for a checkpoint of another version, OSError for what cannot be read.
    """
    path = checkpoint / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        _check_format(path, text)
        manifest = Manifest.from_json(text)
    except FileNotFoundError:
        raise DamageError(path, "missing") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamageError(path, "damaged") from None
    for name, record in manifest.files.items() if check_sizes else ():
        file = checkpoint / name
        if not file.is_file():
            raise DamageError(file, "missing from the checkpoint")
        actual = file.stat().st_size
        if actual != record.size:
            raise DamageError(file, f"damaged ({actual} bytes instead of {record.size})")
    return manifest


def _check_format(path: Path, text: str) -> None:
    """Raises UserError for another version's manifest, and not for this one's with another number by damage."""
    tree = json.loads(text)
    checksum = tree.pop("crc32", None)
    formats = FORMAT, FORMAT_WITH_AVERAGE
    if tree["format"] not in formats and checksum in (None, _checksum(tree)):
        raise UserError(
            f"{path}: format {tree['format']}, this version reads formats {FORMAT} and {FORMAT_WITH_AVERAGE}"
        )
