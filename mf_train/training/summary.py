"""The lines that a run shows before its first step."""

from collections.abc import Mapping

import torch

from mf_train import kernels
from mf_train.checkpoint.save import Saver
from mf_train.config import Config
from mf_train.data.stream.validation import ValidationBlocks
from mf_train.model.counts import count_parameters
from mf_train.parallel.degrees import Degrees
from mf_train.training.inputs import Inputs


def summary(
    config: Config,
    degrees: Degrees,
    device: torch.device,
    inputs: Inputs,
    validation: Mapping[str, ValidationBlocks],
    saver: Saver,
) -> list[str]:
    """Lines on the model, the processes, the kernels, the data, and the checkpoint that the run resumes from.

    `config`: of the phase that comes.
    """
    counts = count_parameters(config.model)
    processes = "1 process" if degrees.world_size == 1 else f"{degrees.world_size} processes"
    lines = [
        f"{config.model.description}: {counts.total / 1e6:.1f} M parameters, {counts.tables / 1e6:.1f} M in tables",
        f"{processes} on {device.type}: tensor {degrees.tensor} x data {degrees.data}, "
        f"ZeRO {config.parallel.zero_stage}, {config.training.precision}; run folder {config.training.output_dir}",
        f"hash and lookup: {kernels.describe(device)}",
    ]
    if degrees.node_size % degrees.tensor:
        lines.append(
            f"warning: groups of parallel.tensor {degrees.tensor} reach over nodes of {degrees.node_size} processes: "
            "the codes and weights of every block travel over the network"
        )
    for name, blocks in validation.items():
        which = f" on {name}" if len(validation) > 1 else ""
        lines.append(
            f"validation{which}: {len(blocks)} sequences, {blocks.num_tokens:,} tokens, unigram entropy "
            f"{blocks.unigram_entropy():.4f} nats (no model without context has a lower loss)"
        )
    if skipped := skipped_documents(inputs):
        lines.append(
            f"data: {sum(skipped.values()):,} documents of {len(skipped)} files left out (data.on_error: skip); "
            "metrics.jsonl names the files"
        )
    if inputs.stream is not None and (files := sum(len(each.left_out) for each in inputs.stream.sources)):
        lines.append(
            f"data: {files:,} files in the sources' folders are of formats that are not read; 'memoryformer data "
            "inspect' names them"
        )
    if saver.last is not None:
        lines.append(f"resumed after step {saver.step} from {saver.last}")
    return lines


def skipped_documents(inputs: Inputs) -> dict[str, int]:
    """Documents left out of each training file."""
    counts: dict[str, int] = {}
    for source in inputs.stream.sources if inputs.stream is not None else ():
        counts.update(source.skipped)
    return counts
