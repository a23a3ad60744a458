"""ZeRO stage 3 by DeepSpeed: parameters, gradients and optimiser state are partitioned over data-parallel ranks.

The only file with deepspeed. What it reads of DeepSpeed beyond its public calls is in `_find_fragment` and
`refresh_parameters`: where a rank keeps its float32 master weights.
"""

import contextlib
import io
import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mf_train.config import Config
from mf_train.parallel.fragment import Fragment
from mf_train.parallel.groups import Groups


class Zero3:
    """A model under DeepSpeed's stage 3; used as `mf_train.parallel.zero.Zero`. `micro_batches`: of a step."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        groups: Groups,
        device: torch.device,
        micro_batches: int,
        settings: list[dict[str, Any]],
    ) -> None:
        deepspeed = import_deepspeed(device, groups.degrees.local_rank)
        self.groups = groups
        self.model = model
        for parameter in model.parameters():
            # DeepSpeed sums the gradient's norm over the tensor-parallel group for parameters marked so
            setattr(parameter, "tensor_model_parallel", True)  # noqa: B010 - not an attribute of Parameter
        # DeepSpeed may run an update while it is built: a learning rate of 0 makes that harmless
        optimizer = torch.optim.AdamW(
            settings, lr=0.0, betas=config.optimizer.betas, eps=config.optimizer.eps, fused=True
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints reports on memory
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                mpu=groups,
                dist_init_required=False,
                config=_deepspeed_config(config, groups.degrees.data, micro_batches),
            )
        self.optimizer: torch.optim.Optimizer = self.engine.basic_optimizer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The backward pass of a micro-batch's share of the batch's loss; `update` follows the step's last."""
        # DeepSpeed averages over ranks
        self.engine.backward(loss * self.groups.degrees.data, scale_wrt_gas=False)
        if not last:
            self.engine.step()

    def update(self) -> Tensor:
        """Clip, update the weights, clear the gradients; the gradient's L2 norm before clipping, float32 []."""
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    def fragments(self) -> dict[str, Fragment]:
        """This rank's fragment of every parameter that it keeps a part of, by name."""
        found = {name: self._find_fragment(parameter) for name, parameter in self.model.named_parameters()}
        return {name: fragment for name, fragment in found.items() if fragment is not None}

    def refresh_parameters(self) -> None:
        """Copy the float32 masters into the parameters that the forward pass reads. Collective."""
        # parameters that a forward pass left gathered would keep their old values
        self.engine.empty_partition_cache()
        parameters: list[Any] = list(self.model.parameters())  # DeepSpeed adds attributes
        for parameter in parameters:
            fragment = self._find_fragment(parameter)
            if fragment is not None:
                parameter.ds_tensor.view(-1).narrow(0, 0, fragment.numel).copy_(
                    fragment.of(fragment.flat.detach())
                )

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self.engine.destroy()

    def _find_fragment(self, parameter: Any) -> Fragment | None:
        zero: Any = self.engine.optimizer
        group, offset, width = zero.grad_position[zero.get_param_id(parameter)]
        start = self.groups.degrees.data_rank * width
        numel = min(width, parameter.ds_numel - start)
        flat = zero.fp32_partitioned_groups_flat[group]
        return Fragment(flat, offset, start, numel) if numel > 0 else None


def import_deepspeed(device: torch.device, local_rank: int) -> Any:
    """The package, told of the device, with nothing compiled at start and errors alone in its log."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # it asks for this one of torchrun's variables
    if device.type == "cpu":
        os.environ.setdefault("LOCAL_SIZE", "1")  # else each of its reductions starts numactl, to count nodes
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


def _deepspeed_config(config: Config, ranks: int, micro_batches: int) -> dict[str, Any]:
    bfloat16, parallel = config.training.precision == "bfloat16", config.parallel
    # many bfloat16 gradients summed in bfloat16 lose the small ones
    accumulation = {"data_types": {"grad_accum_dtype": "fp32"}} if bfloat16 else {}
    return accumulation | {
        # of a batch's sizes it uses the number of micro-batches alone
        "train_batch_size": ranks * micro_batches,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
        "gradient_clipping": config.optimizer.gradient_clip,
        "bf16": {"enabled": bfloat16},
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[parallel.reduce_dtype],
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": parallel.overlap,
            "reduce_bucket_size": parallel.bucket_size,
            # small parameters are not kept whole: they come in the same all-gather as their large neighbours
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": parallel.bucket_size,
        },
    }
