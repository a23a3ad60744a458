"""`memoryformer convert CHECKPOINT MODEL --check`: everything that a certificate says, computed again.

Three lines of defence, each of which stands by itself: the folder against its certificate's hashes; the folder against
what the checkpoint gives, tensor by tensor and file by file, without the code that writes; and the proof by logits and
codes.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from mf_train import __version__
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.safetensors_file import TensorFile, bytes_of
from mf_train.config import Config
from mf_train.errors import TrainingError, UserError
from mf_train.model.quantized import scales_name
from mf_train.standalone.conversion.certificate import certificate_tree, hash_files, read_certificate
from mf_train.standalone.conversion.convert import describe_proof, open_checkpoint, source_tree, text_files
from mf_train.standalone.conversion.proof import prove
from mf_train.standalone.conversion.settings_files import model_card
from mf_train.standalone.conversion.source_files import source_files
from mf_train.standalone.conversion.streamed_model import READ_BYTES, CheckpointWeights
from mf_train.standalone.exported.names import PARAMETER_PREFIX
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
T = TypeVar("T")
_SHOWN = 5  # of the differences, in the message
_PIECE_BYTES = 4 << 20


def check_conversion(checkpoint: Path, model: Path) -> Iterator[str]:
    """Check a standalone folder against its certificate and the checkpoint it was made from; yields lines to show.

    Raises TrainingError naming what differs, UserError where the folder or the checkpoint cannot be used, OSError where
    reading fails.
    """
    certificate = read_certificate(model)
    reader, config = open_checkpoint(checkpoint)
    source, dtype = source_tree(reader, config), certificate["dtype"]
    if certificate["source"]["step"] != source["step"]:
        raise UserError(
            f"{model}: made from {certificate['source'].get('checkpoint')}, and {reader.checkpoint} is of step "
            f"{source['step']}; give the checkpoint that it was made from"
        )
    tensors, files = hash_tensors(model), dict(hash_files(model))
    problems = [*stray_files(model)]
    problems += differing_hashes(certificate["tensors"] | certificate["files"], tensors | files)
    yield f"hashed {len(tensors)} tensors and {len(files)} other files against {CERTIFICATE}: {_count(problems)}"
    found = list(differing_from_checkpoint(reader, config, certificate, tensors, files))
    yield f"converted {reader.checkpoint} again, without writing: {_count(found)}"
    texts = (*source_files(), CARD)
    upgraded = not problems and all(problem.split(" ", 1)[0] in texts for problem in found)
    problems += found
    try:
        proof = prove(reader, config, source["device"], dtype, model)
    except (TrainingError, UserError) as error:
        problems.insert(0, str(error))
        upgraded = False
    else:
        yield from describe_proof(proof, dtype)
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
    return _in_threads(lambda name: _hash_stored(files[name], name), files)


def stray_files(model: Path) -> Iterator[str]:
    """What has no hash, and another program may load: weight files that the index does not name, and folders.

    transformers executes `custom_generate/generate.py` and reads templates from a folder; nothing loads hidden names.
    """
    known = {file.path.name for file in open_tensors(model).values()}
    for path in sorted(model.iterdir()):
        if path.is_file():
            if path.suffix == ".safetensors" and path.name not in known:
                yield f"{path.name} is a file of weights that no index names"
        elif not path.name.startswith("."):
            yield f"{path.name} is not a file, and a converted model has nothing else"


def differing_hashes(certified: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    """What is not as the certificate says: tensors and files by name."""
    for name in sorted({*certified, *found}):
        if name not in found:
            yield f"{name} is missing"
        elif name not in certified:
            yield f"{name} is not in {CERTIFICATE}"
        elif certified[name] != found[name]:
            yield f"{name} has another hash than in {CERTIFICATE}"


def differing_from_checkpoint(
    reader: CheckpointReader,
    config: Config,
    certificate: Mapping[str, Any],
    tensors: Mapping[str, str],
    files: Mapping[str, str],
) -> Iterator[str]:
    """What is not as the checkpoint gives it; `tensors` and `files` are the folder's hashes."""
    dtype = certificate["dtype"]
    texts = text_files(reader, config, dtype)
    try:
        texts[CARD] = model_card(config, certificate)
    except (KeyError, TypeError, ValueError, AttributeError):
        yield f"{CERTIFICATE} lacks figures"
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in texts.items()}
    expected |= converted_hashes(reader, dtype)
    found = {**tensors, **files}
    found.pop(INDEX, None)  # `open_tensors` has compared it with the files
    for name in sorted({*expected, *found}):
        if name not in expected:
            yield f"{name} is not of the checkpoint"
        elif name not in found:
            yield f"{name} of the checkpoint is missing"
        elif expected[name] != found[name]:
            yield f"{name} is not what the checkpoint gives"


def converted_hashes(reader: CheckpointReader, dtype: str) -> dict[str, str]:
    """SHA-256 of every tensor, by outside name, that the checkpoint gives in `dtype`, read slice by slice."""
    weights = CheckpointWeights(reader, dtype)
    found: dict[str, str] = {}
    for hashes in _in_threads(lambda name: _hash_converted(reader, weights, name), reader.shapes).values():
        found |= hashes
    return found


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


def _hash_converted(reader: CheckpointReader, weights: CheckpointWeights, name: str) -> dict[str, str]:
    """SHA-256 by outside name of what a parameter becomes: one tensor, or int8 values and their scales."""
    shape = reader.shapes[name]
    digests: defaultdict[str, Any] = defaultdict(hashlib.sha256)
    numbers = torch.arange(torch.Size(shape[:-1]).numel())
    for rows in numbers.split(max(READ_BYTES // (shape[-1] * 4), 1)):
        values, scales = weights.rows(name, rows)
        digests[name].update(bytes_of(values.contiguous()))
        if scales is not None:
            digests[f"{scales_name(name)}"].update(bytes_of(scales.contiguous()))
    return {PARAMETER_PREFIX + tensor: digest.hexdigest() for tensor, digest in digests.items()}


def _in_threads(hash_one: Callable[[str], T], names: Mapping[str, Any]) -> dict[str, T]:
    """A result for each name, on every core: hashing and reading let other threads run."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(names, pool.map(hash_one, names), strict=True))


def _count(problems: list[str]) -> str:
    return f"{len(problems)} differ" if problems else "all as they should be"
