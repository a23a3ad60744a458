"""Decoding one stream and eight through transformers' `generate`: a MemoryFormer beside GPT-NeoX of its peer's shape.

Random bfloat16 weights, made on the device. The sizes, the prompt and the clock are benchmarks.decode's.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import decode
from benchmarks.gpu.device import TimedDevice
from benchmarks.gpu.steps import Steps, part_arguments
from mf_train.config import Config, ModelConfig
from mf_train.model import MemoryFormer
from mf_train.standalone.conversion.settings_files import settings_files

NAMES, CASES, REPEATS, NEW = ("tiny", "base"), ((1, 64), (8, 64)), 3, 64
_SMALL = ModelConfig(hidden_size=64, num_layers=2, num_heads=4, vocab_size=512, sequence_length=256)


def memoryformer(config: ModelConfig, device: TimedDevice) -> Any:
    """A model as `from_pretrained` gives it, but with random weights that never were on a disk."""
    from mf_train.standalone.exported.configuration_memoryformer import MemoryFormerConfig
    from mf_train.standalone.exported.modeling_memoryformer import MemoryFormerForCausalLM

    settings = json.loads(settings_files(Config(model=config), "bfloat16", 0)["config.json"])
    with torch.device("meta"):
        model = MemoryFormerForCausalLM(MemoryFormerConfig(**settings)).bfloat16()
    model.to_empty(device=device.type)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(float(name.endswith("weight")))
            else:
                parameter.normal_(std=decode.STD)
    return model.eval()


def compare(name: str, device: TimedDevice) -> Mapping[str, Any]:
    """tokens/s of each case from the first new token on, ours and the peer's, taking turns."""
    config = _SMALL if device.rehearse else decode.MODELS[name]
    with torch.device("meta"):
        size = 2 * sum(parameter.numel() for parameter in MemoryFormer(config).parameters())
    device.require(1.2 * size + 2e9, f"{name} in bfloat16 and its peer")
    models = {
        "memoryformer": memoryformer(config, device),
        "gpt_neox": decode.dense_peer(config).to(device.type),
    }
    new = 4 if device.rehearse else NEW
    found: dict[str, Any] = {}
    for batch, length in CASES:
        prompt = torch.randint(1, config.vocab_size, (batch, length), device=device.type)
        seconds: dict[str, list[float]] = {kind: [] for kind in models}
        for model in models.values():
            decode.run(model, prompt, new)
        for _ in range(REPEATS):
            for kind, model in models.items():
                seconds[kind].append(decode.run(model, prompt, new)[1])
        found[f"{batch} x {length}"] = {
            kind: batch * (new - 1) / statistics.median(values) for kind, values in seconds.items()
        }
    return found


def main() -> None:
    options = part_arguments(__doc__).parse_args()
    device, steps = TimedDevice(options.rehearse), Steps(options.results)
    for name in NAMES:
        steps.run(name, lambda name=name: compare(name, device))


if __name__ == "__main__":
    main()
