"""certificate.json: what a proof found, with the SHA-256 of every tensor and file of the folder that it is in."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mf_train import __version__
from mf_train.errors import UserError
from mf_train.standalone.conversion.proof import Comparison, Proof
from mf_train.standalone.folder import CERTIFICATE, DTYPES

FORMAT = 2


def certificate_tree(source: Mapping[str, Any], dtype: str, proof: Proof) -> dict[str, Any]:
    """The content of certificate.json without the SHA-256 of tensors and files. Losses are in nats a token."""
    replay = proof.replay
    return {
        "format": FORMAT,
        "source": dict(source),
        "dtype": dtype,
        "torch": torch.__version__,
        "memoryformer": __version__,
        "probe": {
            "text": proof.text,
            "tokens": proof.tokens,
            "predicted_tokens": len(proof.tokens) - 1,
            **_figures(proof.probe),
        },
        "replay": {
            "precision": proof.precision,
            "exact": proof.exact,
            "allowed_changed_codes": proof.allowed.codes,
            "allowed_logit_error": proof.allowed.logits,
            "largest_logit_difference": replay.largest_logit_difference,
            "relative_logit_error": replay.relative_logit_error,
            "changed_codes": replay.changed_codes,
        },
        "copy": {"equal_logits": proof.logits, "equal_codes": replay.codes},
        "rounding": _figures(proof.rounding),
    }


def _figures(comparison: Comparison) -> dict[str, Any]:
    counts = ("relative_logit_error", "changed", "codes")
    return {name: value for name, value in vars(comparison).items() if name not in counts}


def hash_files(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of every file of a standalone folder but the weights, whose tensors are hashed, the certificate,
    and hidden ones, which nothing loads. What is in sub-folders is not of it (`stray_files`). Raises OSError.
    """
    for path in sorted(folder.iterdir()):
        hidden, weights = path.name.startswith("."), path.suffix == ".safetensors"
        if path.is_file() and not hidden and not weights and path.name != CERTIFICATE:
            with path.open("rb") as file:
                yield path.name, hashlib.file_digest(file, "sha256").hexdigest()


def read_certificate(model: Path) -> dict[str, Any]:
    """The certificate of a folder. Raises UserError where it is missing, damaged or of another version."""
    path = model / CERTIFICATE
    try:
        tree: dict[str, Any] = json.loads(path.read_bytes())
        kind = tree["format"], tree["dtype"]
        sound = all(
            isinstance(tree[key], dict)
            for key in ("source", "probe", "replay", "copy", "rounding", "tensors", "files")
        )
        step = tree["source"]["step"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: missing; give a model that 'memoryformer convert' made") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{path}: damaged, or of another version; convert the checkpoint again") from None
    if kind[0] != FORMAT or kind[1] not in DTYPES or not sound or not isinstance(step, int):
        raise UserError(
            f"{path}: of format {kind[0]!r} and dtype {kind[1]!r}, and this version reads format {FORMAT}; convert the "
            "checkpoint again"
        )
    return tree
