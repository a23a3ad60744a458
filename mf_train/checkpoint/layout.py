"""What a checkpoint folder holds, and the manifest that describes it.

    step-000000200/
      manifest.json                            format, step, degrees, every file's size, every parameter's global shape
      state.json                               the training state beside the tensors: step, tokens, stream
      config.yaml                              the resolved configuration
      tokenizer.model                          absent where the run had only token ids
      probe.safetensors                        tokens, and the trainer's logits and codes on them
      weights-0-of-2-part-000.safetensors      float32 master weights of tensor-parallel rank 0 of 2
      exp_avg-..., exp_avg_sq-...              AdamW's moments, laid out the same

Each tensor is a tensor-parallel slice of a parameter under the parameter's name. The data-parallel degree and the
ZeRO stage leave no trace; parts only spread the writing over ranks.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mf_train.errors import UserError

FORMAT = 1
KINDS = ("master", "exp_avg", "exp_avg_sq")
MANIFEST, STATE, CONFIG, TOKENIZER, PROBE = (
    "manifest.json",
    "state.json",
    "config.yaml",
    "tokenizer.model",
    "probe.safetensors",
)
LATEST = "latest"
_STEP = re.compile(r"step-(\d{9})")


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json. `parameters` maps a name to its global shape, `parts` to the part that holds it."""

    format: int
    step: int
    tensor_parallel: int
    parameters: dict[str, list[int]]
    parts: dict[str, int]
    files: dict[str, int]  # size in bytes

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:09d}"


def part_name(kind: str, tensor_rank: int, tensor_size: int, part: int) -> str:
    """File name of a part; `kind` is one of KINDS."""
    prefix = "weights" if kind == "master" else kind
    return f"{prefix}-{tensor_rank}-of-{tensor_size}-part-{part:03d}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a `checkpoints/` folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir())


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, a `latest` file, or a run's or its checkpoints' newest.

    Raises UserError.
    """
    if path.name == LATEST and path.is_file():
        return resolve_checkpoint(path.parent)
    if (path / MANIFEST).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if found := list_checkpoints(folder):
            return found[-1]
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    raise UserError(f"{path}: holds no complete checkpoint (a folder step-... with {MANIFEST})")


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest, after checking that every file is there with its size. Raises UserError naming the file."""
    try:
        tree: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
        manifest = Manifest(**tree)
    except OSError as error:
        raise UserError(f"{checkpoint / MANIFEST}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError):
        raise UserError(f"{checkpoint / MANIFEST}: damaged; use another checkpoint") from None
    if manifest.format != FORMAT:
        raise UserError(
            f"{checkpoint / MANIFEST}: format {manifest.format}, this version reads format {FORMAT}"
        )
    for name, size in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{path}: missing from the checkpoint; use another with checkpoint.resume=PATH")
        actual = path.stat().st_size
        if actual != size:
            raise UserError(
                f"{path}: {actual} bytes instead of {size}, damaged; use another with checkpoint.resume=PATH"
            )
    return manifest
