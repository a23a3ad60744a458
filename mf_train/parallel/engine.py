"""DeepSpeed's ZeRO engine around a model: a step's backward passes and update, and the state behind each parameter.

The only file with deepspeed. What it reads of DeepSpeed beyond its public calls is in `_find_fragment` and
`refresh_parameters`: where a rank keeps its float32 master weights under each stage.
"""

import contextlib
import io
import logging
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mf_train.config import Config, OptimizerConfig
from mf_train.model import MemoryFormer
from mf_train.model.attention import document_numbers
from mf_train.parallel.groups import Groups

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state beside its count of steps


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter whose float32 master and moments this rank keeps.

    `flat` is the tensor that the optimiser updates; it holds the fragment at [flat_start, flat_start + numel).
    `start` is the fragment's place in the parameter's own elements, in row-major order.
    """

    flat: Tensor
    flat_start: int
    start: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment's view of `flat` or of a tensor laid out like it."""
        return tensor.view(-1).narrow(0, self.flat_start, self.numel)


class Engine:
    """A model under DeepSpeed ZeRO stage 0, 1, 2 or 3 in float32 or bfloat16.

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
        deepspeed = import_deepspeed(device, groups.degrees.local_rank)
        self.stage = config.parallel.zero_stage
        self.gradient_clip = config.optimizer.gradient_clip
        self.groups = groups
        self.device = device
        self.end_of_text = end_of_text
        self.model = model
        for parameter in model.parameters():
            # DeepSpeed sums the gradient's norm over the tensor-parallel group for parameters marked so
            setattr(parameter, "tensor_model_parallel", True)  # noqa: B010 - not an attribute of Parameter
        # DeepSpeed may run an update while it is built: a learning rate of 0 makes that harmless
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optimizer),
            lr=0.0,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=True,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints reports on memory
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                mpu=groups,
                dist_init_required=False,
                config=_deepspeed_config(config, groups.degrees.data),
            )
        self.optimizer: torch.optim.Optimizer = self.engine.basic_optimizer
        self.accumulation: int = self.engine.gradient_accumulation_steps()
        self.reset_step()

    def forward(self, token_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """The model's forward pass, each row one text, as a converted model computes it. Collective over all ranks."""
        output: Tensor = self.engine(token_ids, targets)
        return output

    def losses(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        """Loss of each token [B, S] of packed rows, in nats. Collective over all ranks."""
        documents = None if self.end_of_text is None else document_numbers(token_ids, self.end_of_text)
        output: Tensor = self.engine(token_ids, targets, documents_bs=documents)
        return output

    def backward(self, token_ids: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch [B, S]; returns its mean loss. `update` follows the last one."""
        loss = self.losses(token_ids, targets).mean()
        self.engine.backward(loss)
        if not last:
            self.engine.step()
        return loss.detach()

    def update(self, learning_rate: float) -> float:
        """Clip, update the weights, clear the gradients; returns the gradient's global L2 norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["learning_rate_multiplier"]
        norm = self._clip_plain_gradients() if self.stage == 0 else None
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def _clip_plain_gradients(self) -> Tensor:
        """Clip under stage 0 and return the norm: there DeepSpeed does not keep the norm in float32, and does not
        sum it over the tensor-parallel group in bfloat16 (deepspeed 0.19.8).
        """
        from deepspeed.runtime.utils import clip_grad_norm_

        norm: Tensor = clip_grad_norm_(
            self.model.parameters(), self.gradient_clip or math.inf, mpu=self.groups
        )
        return norm

    def fragments(self) -> dict[str, Fragment]:
        """This rank's fragment of every parameter it keeps a part of, by the parameter's name."""
        found = {name: self._find_fragment(p) for name, p in self.model.named_parameters()}
        return {name: fragment for name, fragment in found.items() if fragment is not None}

    def moment(self, fragment: Fragment, kind: str) -> Tensor:
        """View of a fragment's first or second moment (`MOMENTS`); it exists after a first update."""
        return fragment.of(self.optimizer.state[fragment.flat][kind])

    def reset_step(self, step: int = 0) -> None:
        """Set the number of updates that AdamW's bias correction counts."""
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def local_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of this tensor-parallel rank's part of a parameter, also while ZeRO 3 has it partitioned."""
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        return shape

    @property
    def replicated(self) -> bool:
        """Whether all data-parallel ranks hold the same masters and moments (ZeRO 0), rather than a part each."""
        return self.stage == 0

    def create_moments(self) -> None:
        """Make the optimiser's state exist, by one update with a learning rate of 0, before it is loaded."""
        tokens = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        for index in range(self.accumulation):
            self.backward(tokens, tokens, last=index == self.accumulation - 1)
        self.update(0.0)

    def refresh_parameters(self) -> None:
        """Copy the float32 masters into the parameters that the forward pass reads. Collective."""
        zero = self.engine.optimizer
        parameters: list[Any] = list(self.model.parameters())  # DeepSpeed adds attributes
        if self.stage == 3:
            # parameters that a forward pass left gathered would keep their old values
            self.engine.empty_partition_cache()
            for parameter in parameters:
                fragment = self._find_fragment(parameter)
                if fragment is not None:
                    parameter.ds_tensor.view(-1).narrow(0, 0, fragment.numel).copy_(
                        fragment.of(fragment.flat.detach())
                    )
        elif hasattr(zero, "update_lp_params"):
            zero.update_lp_params()
        elif zero is not self.optimizer:  # stage 0 in bfloat16
            for parameter in parameters:
                master = self._find_fragment(parameter)
                assert master is not None
                parameter.data.copy_(master.flat.data)

    def _find_fragment(self, parameter: Any) -> Fragment | None:
        zero: Any = self.engine.optimizer
        if zero is self.optimizer:
            return Fragment(parameter, 0, 0, parameter.numel())
        if self.stage == 3:
            group, offset, width = zero.grad_position[zero.get_param_id(parameter)]
            start = self.groups.degrees.data_rank * width
            numel = min(width, parameter.ds_numel - start)
            flat = zero.fp32_partitioned_groups_flat[group]
            return Fragment(flat, offset, start, numel) if numel > 0 else None
        if hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            flat = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
            master, low = mapping.hp_fragment_address, mapping.lp_fragment_address
            return Fragment(flat, master.start, low.start, low.numel)
        for low_group, master_group in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
            for low, master in zip(low_group, master_group, strict=True):
                if low is parameter:
                    return Fragment(master, 0, 0, parameter.numel())
        raise AssertionError("a parameter that no optimiser group holds")


def parameter_groups(model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of AdamW: tables with their own learning rate, other matrices, and norms and biases without decay."""
    tables, matrices, small = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith(".tables"):
            tables.append(parameter)
        elif parameter.dim() > 1:
            matrices.append(parameter)
        else:
            small.append(parameter)
    decay, multiplier = optimizer.weight_decay, optimizer.table_learning_rate_multiplier
    groups = [(tables, decay, multiplier), (matrices, decay, 1.0), (small, 0.0, 1.0)]
    return [
        {"params": parameters, "weight_decay": weight_decay, "learning_rate_multiplier": scale}
        for parameters, weight_decay, scale in groups
        if parameters
    ]


def import_deepspeed(device: torch.device, local_rank: int) -> Any:
    """The package, told of the device, with nothing compiled at start and errors alone in its log."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # it asks for this one of torchrun's variables
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # the import sets it back
    if (
        device.type == "cpu"
    ):  # elsewhere it is not asked for, and the first look at this probes every operator
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled
    # it uses names that torch 2.13 has renamed
    warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning, r"torch\.distributed")
    return deepspeed


def _deepspeed_config(config: Config, data_degree: int) -> dict[str, Any]:
    micro = config.training.micro_batch_size
    bfloat16, stage = config.training.precision == "bfloat16", config.parallel.zero_stage
    # many bfloat16 gradients summed in bfloat16 lose the small ones; stage 0 knows no other way (deepspeed 0.19.8)
    accumulation = {"data_types": {"grad_accum_dtype": "fp32"}} if bfloat16 and stage else {}
    return accumulation | {
        "train_batch_size": config.training.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.training.global_batch_size // (data_degree * micro),
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
        "gradient_clipping": config.optimizer.gradient_clip if stage else 0.0,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            # a parameter that is never partitioned would be a second special case of the state's layout
            "stage3_param_persistence_threshold": 0,
        },
    }
