"""Which checkpoints there are (`memoryformer checkpoint list`), and whether each byte is as written (`verify`)."""

import datetime
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from mf_train.checkpoint.checksum import crc_of_file, read_crcs
from mf_train.checkpoint.layout import (
    AVERAGE,
    CONFIG,
    KINDS,
    LATEST,
    MANIFEST,
    PROBE,
    STATE,
    Manifest,
    list_checkpoints,
    part_name,
    read_manifest,
    resolve_checkpoint,
    step_name,
)
from mf_train.checkpoint.read import REMEDY, CheckpointReader
from mf_train.checkpoint.safetensors_file import TensorFile
from mf_train.config.loading import load_config
from mf_train.errors import TrainingError, UserError
from mf_train.processors import usable_processors
from mf_train.run_folder import CHECKPOINTS
from mf_train.text import human_bytes

_TASK_BYTES = 256 << 20  # of a file that one thread reads at a time


def verify(path: Path) -> Iterator[str]:
    """Read a checkpoint, or all of a run's, whole; yields a line for each good one, in the order of their steps.

    Compared are every file's size and checksum, the tensors of every part with the manifest, and the files in the
    folder with those in the manifest; state and configuration must parse. Uses all cores. A line says which of a run's
    checkpoints were deleted meanwhile: they count as neither good nor damaged.

    Raises TrainingError at the end that lists what is damaged, and UserError where there is no checkpoint.
    """
    damaged: dict[Path, list[str]] = {}
    good = 0
    for checkpoint in _find(path):
        problems, line = _examine(checkpoint)
        # the run's trainer deletes what checkpoint.keep does not keep; what was named itself has to be there
        if path in (checkpoint.parent, checkpoint.parent.parent) and not checkpoint.exists():
            yield f"{checkpoint}: deleted meanwhile"
        elif problems:
            damaged[checkpoint] = problems
        else:
            good += 1
            yield line
    if damaged:
        listed = "; ".join(problem for problems in damaged.values() for problem in problems)
        raise TrainingError(f"{len(damaged)} of {good + len(damaged)} checkpoints are damaged: {listed}")
    if not good:
        raise UserError(
            f"{path}: all checkpoints were deleted meanwhile: run this again for those there are now"
        )


def _examine(checkpoint: Path) -> tuple[list[str], str]:
    """The problems of a checkpoint, and the line for one that has none."""
    try:
        if problems := list(find_damage(checkpoint)):
            return problems, ""
        manifest = read_manifest(checkpoint)
    except (UserError, OSError) as error:
        return [_brief(error)], ""
    size = sum(record.size for record in manifest.files.values())
    files = f"{len(manifest.files)} files, {human_bytes(size)}"
    return [], f"{checkpoint}: good: {_describe(manifest)}, {files}"


def find_damage(checkpoint: Path) -> Iterator[str]:
    """The problems of a checkpoint, each with its file's path; none where it is good."""
    try:
        reader = CheckpointReader(checkpoint, check_sizes=False)
    except (UserError, OSError) as error:
        yield _brief(error)
        return
    manifest = reader.manifest
    sound = []  # files whose contents are worth a look
    checksums = _checksums(checkpoint, {name: record.size for name, record in manifest.files.items()})
    for name, record in sorted(manifest.files.items()):
        found = checksums[name]
        if isinstance(found, str):
            yield f"{checkpoint / name}: {found}"
        elif found != record.crc32:
            yield f"{checkpoint / name}: its checksum is {found:08x} instead of {record.crc32:08x}"
        else:
            sound.append(name)
    try:
        for name in sorted({path.name for path in checkpoint.iterdir()} - {*manifest.files, MANIFEST}):
            yield f"{checkpoint / name}: not in {MANIFEST}"
    except OSError as error:
        yield f"{checkpoint}: cannot be read ({error.strerror})"
    expected = _expected_parts(reader)
    for name in sorted({STATE, CONFIG, PROBE, *expected} - {*manifest.files}):
        yield f"{checkpoint / name}: missing from the checkpoint and from {MANIFEST}"
    if checkpoint.name.startswith("step-") and checkpoint.name != step_name(manifest.step):
        yield f"{checkpoint / MANIFEST}: of step {manifest.step}"
    for name in sound:
        yield from _check_contents(reader, name, expected)


def list_lines(run: Path) -> Iterator[str]:
    """A line for each checkpoint of a run's folder, oldest first: its step, size, date, degree and whether `latest`.

    Raises UserError where there is none.
    """
    for checkpoint in _find(run):
        newest = checkpoint.with_name(LATEST)
        try:
            latest = "  latest" if newest.read_text().strip() == checkpoint.name else ""
        except (OSError, UnicodeDecodeError):
            latest = ""
        try:
            manifest = read_manifest(checkpoint)
            written = datetime.datetime.fromtimestamp((checkpoint / MANIFEST).stat().st_mtime)
        except (UserError, OSError) as error:
            if checkpoint.exists():  # else the run's trainer has deleted it meanwhile
                yield f"{checkpoint.name}  {_brief(error)}{latest}"
            continue
        size = sum(record.size for record in manifest.files.values())
        yield f"{checkpoint.name}  {human_bytes(size):>8}  {written:%Y-%m-%d %H:%M}  {_describe(manifest)}{latest}"


def _find(path: Path) -> list[Path]:
    """The checkpoint at `path`, or those of a run or its `checkpoints` folder."""
    for folder in (path, path / CHECKPOINTS):
        if found := list_checkpoints(folder):
            return found
    if path.is_dir() and path.name.startswith("step-"):
        return [path]  # also one that has lost its manifest
    return [resolve_checkpoint(path)]


def _checksums(folder: Path, sizes: Mapping[str, int]) -> dict[str, int | str]:
    """CRC-32 of each file, or what is wrong with it; read by a thread for each processor."""
    found: dict[str, int | str] = {}
    with ThreadPoolExecutor(usable_processors()) as pool:
        tasks = {}
        for name, size in sizes.items():
            if problem := _check_size(folder / name, size):
                found[name] = problem
                continue
            readers = -(-size // _TASK_BYTES)
            tasks[name] = [pool.submit(read_crcs, folder, {name: size}, i, readers) for i in range(readers)]
        for name, crcs in tasks.items():
            combined = 0
            try:
                for crc in crcs:
                    combined ^= crc.result()[0]
                found[name] = crc_of_file(combined, sizes[name])
            except OSError as error:
                found[name] = f"cannot be read ({error.strerror})"
    return found


def _check_size(path: Path, size: int) -> str:
    try:
        if path.is_symlink() or not path.is_file():
            return "missing, or not a file"
        actual = path.stat().st_size
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if actual == size else f"{actual} bytes instead of {size}"


def _expected_parts(reader: CheckpointReader) -> dict[str, dict[str, tuple[int, ...]]]:
    """Part files that the manifest's parameters make, each with its tensors' shapes."""
    manifest = reader.manifest
    parts: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, part in manifest.parts.items():
        parts.setdefault(part, {})[name] = reader.local_shape(name)
    return {
        part_name(kind, rank, manifest.tensor_parallel, part): shapes
        for kind in manifest.kinds
        for rank in range(manifest.tensor_parallel)
        for part, shapes in parts.items()
    }


def _check_contents(
    reader: CheckpointReader, name: str, expected: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> Iterator[str]:
    """The problems in the contents of a file whose checksum is right: it was written wrongly, or its manifest was."""
    path = reader.checkpoint / name
    try:
        if name == STATE:
            if (step := reader.state().get("step")) != reader.manifest.step:
                yield f"{path}: of step {step}, and {MANIFEST} of step {reader.manifest.step}"
        elif name == CONFIG:
            load_config(path)
        elif name in expected or name == PROBE:
            with TensorFile(path) as file:
                held = {
                    tensor: (file.tensors[tensor].dtype, file.tensors[tensor].shape)
                    for tensor in file.tensors
                }
            wanted = {tensor: (torch.float32, shape) for tensor, shape in expected.get(name, {}).items()}
            for tensor in sorted({*held, *wanted}) if name in expected else ():
                if held.get(tensor) != wanted.get(tensor):
                    yield f"{path}: {tensor} is {held.get(tensor)} in it and {wanted.get(tensor)} by {MANIFEST}"
    except (UserError, OSError) as error:
        yield _brief(error)


def _describe(manifest: Manifest) -> str:
    kinds = "" if manifest.kinds[: len(KINDS)] == KINDS else ", without moments"
    if AVERAGE in manifest.kinds:
        kinds += ", with an average of the weights"
    return f"step {manifest.step}, tensor-parallel {manifest.tensor_parallel}{kinds}"


def _brief(error: Exception) -> str:
    """Without the remedy, which is one for who resumes."""
    return str(error).removesuffix(f"; {REMEDY}")
