"""The engine around a model: a step's backward passes and update, and the state behind each parameter.

ZeRO's stages 0 to 2 are in `mf_train.parallel.zero`, stage 3 is DeepSpeed's (`mf_train.parallel.zero3`).
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mf_train.config import Config, OptimizerConfig
from mf_train.config.groups import Rule, group_of, group_rules
from mf_train.model import MemoryFormer
from mf_train.model.attention.masks import document_numbers
from mf_train.parallel.degrees import count_micro_batches
from mf_train.parallel.fragment import Fragment
from mf_train.parallel.groups import Groups
from mf_train.parallel.kinds import MOMENTS, kept_kinds
from mf_train.parallel.zero import Zero

__all__ = ["MOMENTS", "Engine", "Fragment", "parameter_groups"]


class Optimizer(Protocol):
    """A model's gradients and AdamW: what `mf_train.parallel.zero` and `mf_train.parallel.zero3` both offer."""

    steps: int  # updates so far, which the bias correction counts

    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    def gradient_norm(self) -> Tensor: ...

    def update(self, learning_rate: float) -> Tensor: ...

    def drop(self) -> None: ...

    def fragments(self) -> dict[str, Fragment]: ...

    def gradient_sums(self) -> list[Tensor]: ...

    def refresh_parameters(self) -> None: ...

    def close(self) -> None: ...


class Engine:
    """A model under ZeRO stage 0, 1, 2 or 3 in float32 or bfloat16.

    With `end_of_text`, the id that ends each document of a packed row, documents of a row do not attend to each
    other in `losses` and `backward` (`data.document_attention`).
    """

    def __init__(
        self,
        model: MemoryFormer,
        config: Config,
        groups: Groups,
        device: torch.device,
        end_of_text: int | None = None,
    ) -> None:
        self.stage = config.parallel.zero_stage
        # of the numbers that ranks keep of every parameter
        self.kinds = kept_kinds(config.training.average_decay)
        self.groups = groups
        self.device = device
        self.end_of_text = end_of_text
        self.model = model
        model.head.z_loss = config.training.z_loss
        self.micro_batches = count_micro_batches(config, groups.degrees.data)
        if config.training.precision == "bfloat16":
            model.bfloat16()
        settings = parameter_groups(model, config.optimizer)
        if self.stage == 3:
            from mf_train.parallel.zero3 import Zero3

            zero3 = Zero3(model, config, groups, device, self.micro_batches, settings)
            self._zero: Optimizer = zero3
            self._call: nn.Module = zero3.engine
        else:
            self._zero = Zero(model, config, groups, settings)
            self._call = model

    def forward(self, token_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """The model's forward pass, each row one text, as a converted model computes it. Collective over all ranks."""
        output: Tensor = self._call(token_ids, targets)
        return output

    def predictions(self, token_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each token [B, S] in nats, and the likeliest token in its place [B, S]; each row one text.

        Collective over all ranks.
        """
        logits: Tensor = self._call(token_ids)
        return self.model.head.token_losses(logits, targets), self.model.head.likeliest(logits)

    def losses(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        """Loss of each token [B, S] of packed rows, in nats. Collective over all ranks."""
        documents = None if self.end_of_text is None else document_numbers(token_ids, self.end_of_text)
        output: Tensor = self._call(token_ids, targets, documents_bs=documents)
        return output

    def backward(self, token_ids: Tensor, targets: Tensor, *, share: float, last: bool) -> Tensor:
        """Forward and backward of one micro-batch [B, S], which is `share` of the global batch's rows.

        Returns share times its mean loss, a float32 []: over micro-batches and data-parallel ranks these add up to the
        global batch's mean. `update` or `drop` follows the `last` of the step's `micro_batches`.
        """
        loss = self.losses(token_ids, targets).mean() * share
        self._zero.backward(loss, last=last)
        return loss.detach()

    def gradient_norm(self) -> Tensor:
        """The gradient's global L2 norm before clipping, float32 []: for who decides between `update` and `drop`."""
        return self._zero.gradient_norm()

    def update(self, learning_rate: float) -> Tensor:
        """Clip, update the weights, clear the gradients; the gradient's global L2 norm before clipping, float32 []."""
        return self._zero.update(learning_rate)

    def drop(self) -> None:
        """Clear the gradients; weights, moments and the count of updates stay as they are. Collective."""
        self._zero.drop()

    def fragments(self) -> dict[str, Fragment]:
        """This rank's fragment of every parameter it keeps a part of, by the parameter's name."""
        return self._zero.fragments()

    def gradient_sums(self) -> list[Tensor]:
        """The sums of gradients that this rank keeps between steps, float32."""
        return self._zero.gradient_sums()

    @property
    def steps(self) -> int:
        """Updates that AdamW's bias correction counts."""
        return self._zero.steps

    def reset_step(self, step: int) -> None:
        """Set the number of updates that AdamW's bias correction counts."""
        self._zero.steps = step

    def local_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of this tensor-parallel rank's part of a parameter, also while ZeRO 3 has it partitioned."""
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        return shape

    @property
    def replicated(self) -> bool:
        """Whether all data-parallel ranks hold the same masters and moments (ZeRO 0), rather than a part each."""
        return self.stage == 0

    def refresh_parameters(self) -> None:
        """Copy the float32 masters into the parameters that the forward pass reads. Collective."""
        self._zero.refresh_parameters()

    def close(self) -> None:
        """Leave the model without hooks, so that all memory goes with the last reference. The last call."""
        self._zero.close()


def parameter_groups(model: MemoryFormer, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of AdamW: parameters that have the same learning rate and decay (`mf_train.config.groups`).

    Tables, other matrices, and norms and biases come in this order and are apart, also where they have the same: in
    stage 3 the order and the ends of groups show in the last bits.
    """
    rules = group_rules(optimizer, model.config.hidden_size)
    found: dict[tuple[int, Rule], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rank = 0 if name.endswith(".tables") else 1 if parameter.dim() > 1 else 2
        found.setdefault((rank, rules[group_of(name, parameter.dim())]), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": rule.weight_decay,
            "learning_rate_multiplier": rule.multiplier,
        }
        for (_, rule), parameters in sorted(found.items(), key=lambda item: item[0][0])
    ]
