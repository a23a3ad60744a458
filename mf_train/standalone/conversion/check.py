"""`memoryformer convert CHECKPOINT MODEL --check`: everything that a certificate says, computed again.

Three lines of defence, each of which stands by itself: the folder against its certificate's hashes; the folder against
another conversion of the checkpoint, tensor by tensor and file by file; and the proof by logits and codes, which does
not rely on the code that converts.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mf_train import __version__
from mf_train.checkpoint.layout import AVERAGE
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.safetensors_file import TensorFile
from mf_train.config import Config
from mf_train.errors import TrainingError, UserError
from mf_train.standalone.conversion.card import model_card
from mf_train.standalone.conversion.certificate import certificate_tree, hash_files, read_certificate
from mf_train.standalone.conversion.convert import (
    describe_proof,
    open_checkpoint,
    phases_until,
    source_tree,
    text_files,
)
from mf_train.standalone.conversion.proof import prove
from mf_train.standalone.conversion.source_files import source_files
from mf_train.standalone.conversion.weights import convert_weights, in_threads, stored_tensors
from mf_train.standalone.folder import CARD, CERTIFICATE, INDEX, open_tensors

# A figure of the certificate may differ from the one computed again by this share of it: another processor rounds
# otherwise. The same one gives the same bits.
TOLERANCE = 0.01
# Figures that measure roundings differ by more, for those are all they are: by this share, and by what float32's
# roundings alone come to. A dtype's are larger, so that a figure set to 0 is found.
NOISE_TOLERANCE = 0.5
FLOORS = {
    "largest_logit_difference": 1e-3,
    "allowed_logit_error": 1e-3,
    "relative_logit_error": 1e-4,
    "changed_codes": 1e-3,
    "allowed_changed_codes": 1e-3,
    "loss_difference": 1e-3,
    "divergence": 1e-6,
}
# Of a name: it is missing, nothing is known of it, its contents are others.
BY_CERTIFICATE = ("is missing", f"is not in {CERTIFICATE}", f"has another hash than in {CERTIFICATE}")
BY_CHECKPOINT = (
    "of the checkpoint is missing",
    "is not of the checkpoint",
    "is not what the checkpoint gives",
)
_SHOWN = 5  # of the differences, in the message
_PIECE_BYTES = 4 << 20


def check_conversion(checkpoint: Path, model: Path) -> Iterator[str]:
    """Check a standalone folder against its certificate and the checkpoint it was made from; yields lines to show.

    Raises TrainingError naming what differs, UserError where the folder or the checkpoint cannot be used, OSError where
    reading fails.
    """
    certificate = read_certificate(model)
    reader, config = open_checkpoint(checkpoint, average=certificate["source"].get("weights") == AVERAGE)
    source, dtype = source_tree(reader, config), certificate["dtype"]
    if certificate["source"]["step"] != source["step"]:
        raise UserError(
            f"{model}: made from {certificate['source'].get('checkpoint')}, and {reader.checkpoint} is of step "
            f"{source['step']}; give the checkpoint that it was made from"
        )
    tensors, files = hash_tensors(model), dict(hash_files(model))
    found = tensors | files
    problems = [
        *stray_files(model),
        *differing(found, certificate["tensors"] | certificate["files"], BY_CERTIFICATE),
    ]
    yield f"hashed {len(tensors)} tensors and {len(files)} other files against {CERTIFICATE}: {_count(problems)}"
    again = list(differing_from_checkpoint(reader, config, certificate, found))
    yield f"converted {reader.checkpoint} again, without writing: {_count(again)}"
    texts = (*source_files(), CARD)
    upgraded = not problems and all(problem.split(" ", 1)[0] in texts for problem in again)
    problems += again
    try:
        proof = prove(reader, config, source["device"], dtype, model)
    except (TrainingError, UserError) as error:
        problems.insert(0, str(error))
        upgraded = False
    else:
        yield from describe_proof(proof, dtype, reader.weights)
        expected = json.loads(json.dumps(certificate_tree(source, dtype, proof)))
        figures = list(differing_figures(expected, certificate))
        upgraded = upgraded and not figures
        problems += figures
    if problems:
        made = certificate.get("memoryformer")
        if upgraded and made != __version__:
            raise TrainingError(
                f"{model}: its weights are the checkpoint's, and its figures are right, but memoryformer {made} made "
                f"it, and this is {__version__}, which writes {len(problems)} of its files otherwise "
                f"({'; '.join(problems[:_SHOWN])}): check with {made}, or convert again"
            )
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise TrainingError(f"{model}: not what was trained: {'; '.join(problems[:_SHOWN])}{more}")
    yield f"{model}: is {reader.checkpoint} in {dtype}"


def hash_tensors(model: Path) -> dict[str, str]:
    """SHA-256 of the bytes of every tensor in a folder's files. Raises UserError or OSError."""
    files = open_tensors(model)
    shapes = {name: file.tensors[name].shape for name, file in files.items()}
    return in_threads(shapes, lambda name, _: _hash_stored(files[name], name))


def stray_files(model: Path) -> Iterator[str]:
    """Entries without a hash that another program may load: weight files that the index does not name, and folders.

    transformers executes `custom_generate/generate.py` and reads templates from a folder; nothing loads hidden names.
    """
    known = {file.path.name for file in open_tensors(model).values()}
    for path in sorted(model.iterdir()):
        if path.is_file():
            if path.suffix == ".safetensors" and path.name not in known:
                yield f"{path.name} is a file of weights that no index names"
        elif not path.name.startswith("."):
            yield f"{path.name} is not a file, and a converted model has nothing else"


def differing(
    found: Mapping[str, str], expected: Mapping[str, str], problems: tuple[str, str, str]
) -> Iterator[str]:
    """Tensors and files by name whose hashes are not those expected."""
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            yield f"{name} {problems[0 if name not in found else 1 if name not in expected else 2]}"


def differing_from_checkpoint(
    reader: CheckpointReader, config: Config, certificate: Mapping[str, Any], found: Mapping[str, str]
) -> Iterator[str]:
    """What is not as a conversion of the checkpoint would write it; `found` are the hashes of the folder's."""
    dtype = certificate["dtype"]
    texts = text_files(reader, config, dtype)
    try:
        texts[CARD] = model_card(phases_until(reader), certificate)
    except (KeyError, TypeError, ValueError, AttributeError):
        yield f"{CERTIFICATE} lacks figures"
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in texts.items()}
    tensors = stored_tensors(reader.shapes, getattr(torch, dtype))
    expected |= convert_weights(reader, tensors, lambda *_: None)
    # `open_tensors` has compared the index with the files
    found = {name: digest for name, digest in found.items() if name != INDEX}
    yield from differing(found, expected, BY_CHECKPOINT)


def differing_figures(
    computed: Mapping[str, Any], certified: Mapping[str, Any], within: str = "", floor: float | None = None
) -> Iterator[str]:
    """Values of the certificate that are not those computed again, numbers within TOLERANCE, or within
    NOISE_TOLERANCE and `floor` or that of FLOORS.

    Versions are left alone, and so are the hashes, which `computed` does not have.
    """
    for key in computed:
        name, new, old = f"{within}{key}", computed[key], certified.get(key)
        if name in ("torch", "memoryformer", "source.checkpoint"):
            continue
        least = FLOORS.get(key, floor)
        if isinstance(new, dict) and isinstance(old, dict):
            yield from differing_figures(new, old, f"{name}.", least)
        elif not _near(new, old, least):
            yield f"{CERTIFICATE}: {name} is {_short(old)}, and computed again {_short(new)}"


def _near(new: Any, old: Any, floor: float | None) -> bool:
    if isinstance(new, float) and isinstance(old, float):
        share, least = (TOLERANCE, 0.0) if floor is None else (NOISE_TOLERANCE, floor)
        return abs(new - old) <= share * max(abs(new), abs(old)) + least
    return bool(new == old)


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hash_stored(file: TensorFile, name: str) -> str:
    dtype, shape, offset = file.tensors[name]
    left, digest = torch.Size(shape).numel() * dtype.itemsize, hashlib.sha256()
    with file.path.open("rb") as data:
        data.seek(offset)
        while left:
            piece = data.read(min(left, _PIECE_BYTES))
            if not piece:
                raise UserError(
                    f"{file.path}: shorter than it was when it was opened; convert the checkpoint again"
                )
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _count(problems: list[str]) -> str:
    return f"{len(problems)} differ" if problems else "all as they should be"
