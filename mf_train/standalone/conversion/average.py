"""`memoryformer checkpoint average`: the mean of a run's weights at several steps, as a checkpoint.

The mean of checkpoints along a run is often better than the last of them (Izmailov et al. 2018, arXiv 1803.05407;
Kaddour 2022, arXiv 2209.14981). It is taken in float64, a few slices at a time.
"""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mf_train.checkpoint.layout import (
    CONFIG,
    MANIFEST,
    Manifest,
    format_of,
    list_checkpoints,
    step_of,
)
from mf_train.checkpoint.probe import probe_tensors
from mf_train.checkpoint.read import CheckpointReader, Checksums
from mf_train.checkpoint.safetensors_file import Region
from mf_train.checkpoint.save import Extras, write_extras
from mf_train.config import Config
from mf_train.errors import UserError
from mf_train.files import write_synced
from mf_train.run_folder import CHECKPOINTS
from mf_train.standalone.conversion.checkpoint_parts import write_parts
from mf_train.standalone.conversion.convert import check_output, new_folder, open_checkpoint
from mf_train.standalone.conversion.proof import read_probe
from mf_train.standalone.conversion.streamed_model import CheckpointWeights, compute, streamed_model
from mf_train.standalone.conversion.weights import SLICE_BYTES, whole_rows
from mf_train.text import human_bytes


def average(run: Path, steps: Sequence[int], output: Path) -> Iterator[str]:
    """Write the mean of the weights that a run had at `steps` into `output`, complete or absent; yields a line on it.

    Everything else is that of the last of the steps: moments, place in the data, configuration, tensor-parallel degree.
    So a run resumes from it (`checkpoint.resume`), and `convert` takes it: the probe is computed anew. Every checksum
    is compared on the way.

    Raises UserError for steps without a checkpoint, a damaged one, or an output that is there; OSError where writing
    fails. None of them leaves anything at `output`.
    """
    started = time.perf_counter()
    output = Path(os.path.abspath(output))
    check_output(output)
    found = [open_checkpoint(path) for path in _find(run, steps)]
    readers = [reader for reader, _ in found]
    last, config = found[-1]
    for reader, _ in found:
        if reader.shapes != last.shapes:
            raise UserError(f"{reader.checkpoint}: of another model than {last.checkpoint}; leave it out")
    with new_folder(output, last=MANIFEST) as folder:
        manifest = _write_weights(readers, folder)
        write_synced(folder / MANIFEST, manifest.to_json().encode())  # by which the probe reads the weights
        manifest.files.update(write_extras(folder, _extras(last, config, folder, sorted(steps))))
        write_synced(folder / MANIFEST, manifest.to_json().encode())
    size = sum(path.stat().st_size for path in output.iterdir())
    yield (
        f"wrote {output}: the mean of the weights after steps {', '.join(map(str, sorted(steps)))}; all else as after "
        f"step {last.manifest.step}; {human_bytes(size)}, {time.perf_counter() - started:.1f} s"
    )
    yield f"go on from it with checkpoint.resume={output} and a training.output_dir of its own, or convert it"


def _find(run: Path, steps: Sequence[int]) -> list[Path]:
    """The run's checkpoints of these steps, oldest first. Raises UserError."""
    if len(steps) < 2 or len(set(steps)) < len(steps):
        raise UserError(f"{run}: a mean is of several steps, each given once: {', '.join(map(str, steps))}")
    held = {step_of(path): path for folder in (run, run / CHECKPOINTS) for path in list_checkpoints(folder)}
    if missing := [str(step) for step in steps if step not in held]:
        there = ", ".join(map(str, sorted(held))) or "none"
        raise UserError(
            f"{run}: no checkpoint of step {', '.join(missing)}; there are those of: {there} (checkpoint.keep and "
            "checkpoint.keep_every say which a run keeps)"
        )
    return [held[step] for step in sorted(steps)]


def _write_weights(readers: Sequence[CheckpointReader], folder: Path) -> Manifest:
    last, checksums = readers[-1], [Checksums() for _ in readers]

    def read(kind: str, name: str, buffer: Tensor) -> Iterator[tuple[Tensor, Region]]:
        for region in whole_rows(last.shapes[name], SLICE_BYTES // torch.float32.itemsize):
            if kind != "master":
                yield last.read(name, kind, region, buffer, checksums[-1]), region
                continue
            total = torch.zeros([part.stop - part.start for part in region], dtype=torch.float64)
            for reader, sums in zip(readers, checksums, strict=True):
                total += reader.read(name, kind, region, buffer, sums)
            yield (total / len(readers)).float(), region

    old = last.manifest
    records = write_parts(folder, last.shapes, old.parts, old.tensor_parallel, old.kinds, read)
    for reader, sums in zip(readers, checksums, strict=True):
        sums.check(reader.manifest)
    return Manifest(
        format_of(old.kinds), old.step, old.tensor_parallel, old.kinds, last.shapes, old.parts, records
    )


def _extras(last: CheckpointReader, config: Config, folder: Path, steps: Sequence[int]) -> Extras:
    probe = read_probe(last, config)
    weights = CheckpointWeights(CheckpointReader(folder), config.training.precision)
    results = compute(streamed_model(config.model, weights), probe.results.tokens)
    tensors = probe_tensors(
        results.tokens, results.logits, results.codes, validation=probe.text == "validation"
    )
    # the losses that were measured are of other weights, and the probe was computed here
    state = last.state() | {"metrics": {}, "device": "cpu", "averaged_steps": list(steps)}
    return Extras(state, last.read_file(CONFIG).decode(), last.read_tokenizer(), tensors)
