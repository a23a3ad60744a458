"""ZeRO stage 3 by DeepSpeed: parameters, gradients and optimiser state are partitioned over data-parallel ranks.

The only file with deepspeed. What it reads of DeepSpeed beyond its public calls is in `_places` and
`refresh_parameters`: where a rank keeps its float32 master weights; and in `gradient_norm`.
"""

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mf_train.config import Config
from mf_train.parallel.adamw import AdamW, Updated
from mf_train.parallel.fragment import Fragment
from mf_train.parallel.groups import Groups
from mf_train.parallel.kinds import AVERAGE
from mf_train.parallel.moments import Moments
from mf_train.parallel.stored import Float32, Stored, copy_of


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
        self.device = device
        self.model = model
        for parameter in model.parameters():
            # DeepSpeed sums the gradient's norm over the tensor-parallel group for parameters marked so
            setattr(parameter, "tensor_model_parallel", True)  # noqa: B010 - not an attribute of Parameter
        moments = Moments(model.named_parameters(), config.optimizer, groups.degrees)
        self.optimizer = _AdamW(settings, config, moments)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints reports on memory
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                mpu=groups,
                dist_init_required=False,
                config=_deepspeed_config(config, groups.degrees.data, micro_batches),
            )
        for place in self._places():
            self.optimizer.own(*place)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The backward pass of a micro-batch's share of the batch's loss; `update` follows the step's last."""
        # DeepSpeed averages over ranks
        self.engine.backward(loss * self.groups.degrees.data, scale_wrt_gas=False)
        if not last:
            self.engine.step()

    def gradient_norm(self) -> Tensor:
        """The gradient's L2 norm before clipping, float32 []; infinite where it is not a number. Collective."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        # as its own step computes it once more: to clip, and to leave out an update that is not finite
        norm = combine_grad_norm_groups(self.engine.optimizer._get_norm_groups())
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    def update(self, learning_rate: float) -> Tensor:
        """Clip, update the weights, clear the gradients; the gradient's L2 norm before clipping, float32 []."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    def drop(self) -> None:
        """Forget the step's gradients. Weights, moments and `steps` stay as they are. Collective."""
        self.optimizer.idle = True
        self.engine.step()
        self.optimizer.idle = False

    def fragments(self) -> dict[str, Fragment]:
        """This rank's fragment of every parameter that it keeps a part of, by name."""
        return self.optimizer.fragments

    def gradient_sums(self) -> list[Tensor]:
        """The sums of gradients that this rank keeps between steps, float32."""
        return [self.engine.optimizer.grad_partitions_flat_buffer]

    @property
    def steps(self) -> int:
        """Updates that the bias correction counts."""
        return self.optimizer.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self.optimizer.steps = steps

    def refresh_parameters(self) -> None:
        """Copy the float32 masters into the parameters that the forward pass reads. Collective."""
        # parameters that a forward pass left gathered would keep their old values
        self.engine.empty_partition_cache()
        parameters: dict[str, Any] = dict(self.model.named_parameters())  # DeepSpeed adds attributes
        for name, fragment in self.fragments().items():
            weights = parameters[name].ds_tensor.view(-1).narrow(0, 0, fragment.numel)
            weights.copy_(fragment.held("master").read())

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model, which has no weights any more, and give all memory back."""
        self.engine.destroy()
        # the engine stays alive by hooks of autograd that Python's collector does not see through, so what takes memory
        # is taken from it
        zero, self.engine.optimizer = self.engine.optimizer, None
        for holder in (zero, self.optimizer, *self.model.parameters()):
            vars(holder).clear()
        for parameter in self.model.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.device)

    def _places(self) -> Iterator[tuple[str, Tensor, int, int, int]]:
        """Of each parameter that this rank has a part of: its name, the flat tensor of masters that holds the part, the
        part's place in it, its place in the parameter, and its length.
        """
        zero: Any = self.engine.optimizer
        parameters: Any = self.model.named_parameters()
        for name, parameter in parameters:
            group, offset, width = zero.grad_position[zero.get_param_id(parameter)]
            start = self.groups.degrees.data_rank * width
            numel = min(width, parameter.ds_numel - start)
            if numel > 0:
                yield name, zero.fp32_partitioned_groups_flat[group], offset, start, numel


class _AdamW(torch.optim.Optimizer):
    """What DeepSpeed calls in the place of torch's AdamW: `mf_train.parallel.adamw` on its flat tensors of masters.

    A flat tensor whose moments are all in float32 is updated as a whole, as torch's AdamW does it and with the same
    bits; of others each parameter by itself.
    """

    def __init__(self, settings: list[dict[str, Any]], config: Config, moments: Moments) -> None:
        super().__init__(settings, {"lr": 0.0})
        self.moments = moments
        alignment, self.average_decay = math.lcm(*moments.units.values()), config.training.average_decay
        self.adamw = AdamW(config.optimizer, config.training.seed, alignment, self.average_decay)
        self.steps = 0
        self.idle = False  # a step that is called leaves everything as it is
        self.fragments: dict[str, Fragment] = {}
        # by flat tensor: what is updated at once, with its place in the tensor and the parameter's name
        self._parts: dict[Tensor, list[tuple[int, Fragment, str]]] = {}

    def own(self, name: str, flat: Tensor, offset: int, start: int, numel: int) -> None:
        """Make the moments of a part of a parameter that a rank holds, as `Zero3._places` names it."""
        parts = self._parts.setdefault(flat, [])
        if self.moments.compact or not parts:
            first, length = (offset, numel) if self.moments.compact else (0, flat.numel())
            master = Float32((flat.detach().narrow(0, first, length),), length)
            values: dict[str, Stored] = {"master": master, **self.moments.zeros(name, length, flat.device)}
            if self.average_decay:
                values[AVERAGE] = copy_of(master)
            parts.append((first, Fragment(start, length, values), name))
        first, updated, _ = parts[-1]
        values = {kind: held.narrow(offset - first, numel) for kind, held in updated.values.items()}
        self.fragments[name] = Fragment(start, numel, values)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the flat tensors that are in the groups at the time: DeepSpeed gives one at a time."""
        if self.idle:
            return
        for group in self.param_groups:
            updated = (each for flat in group["params"] for each in self._updated(flat, group))
            self.adamw.update(updated, group["lr"], self.steps)

    def _updated(self, flat: Tensor, group: dict[str, Any]) -> Iterator[Updated]:
        assert flat.grad is not None
        for offset, fragment, name in self._parts.get(flat, ()):
            gradient = flat.grad.narrow(0, offset, fragment.numel).float()
            places = self.moments.places(name, fragment.start)
            multiplier = group["learning_rate_multiplier"]
            yield Updated(replace(fragment, gradient=gradient), group["weight_decay"], multiplier, places)


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
        "zero_allow_untested_optimizer": True,  # ours
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
            "offload_optimizer": {
                "device": "cpu" if parallel.offload == "optimizer" else "none",
                "pin_memory": True,
            },
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW does as well on the host
    }
