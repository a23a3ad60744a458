"""ZeRO stages 0, 1 and 2: gradients summed in float32, and AdamW on what a rank owns.

Parameters lie one behind another in a few flat buckets, in the order in which the backward pass finishes them. Each
data-parallel rank has one equal shard of every bucket. Of a bucket, R ranks and n elements a stage sends, in a step:

    0   the sums: a reduce-scatter and an all-gather in float32; every rank updates everything
    1   the sums: a reduce-scatter in float32; the updated weights: an all-gather in their dtype
    2   as 1, but a reduce-scatter in each micro-batch: between them a rank keeps the sums of its shard alone

each (R - 1) / R * n elements a rank. So stages 0 and 1 train with the same bits, and overlap changes none: it decides
when a collective starts, not what it adds. The sizes are those of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054,
section 7); buckets are split over ranks as megatron-core's distributed optimiser splits its own, which runs on GPUs
alone. DeepSpeed's optimiser of stages 1 and 2 gives each rank one range of all parameters instead, so that it has to
all-reduce whole buckets or to send one reduction for each owner (docs/parallel.md has the counts).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mf_train.config import Config
from mf_train.kernels.composition import Sum, add_to
from mf_train.parallel.adamw import AdamW, Updated
from mf_train.parallel.collectives import collective
from mf_train.parallel.exchange import all_gather, all_to_all, reduce_scatter
from mf_train.parallel.fragment import Fragment
from mf_train.parallel.groups import Groups
from mf_train.parallel.kinds import AVERAGE
from mf_train.parallel.moments import Moments
from mf_train.parallel.stored import Float32, Split, Stored, copy_of

_ALIGNMENT = 64  # elements: whole cache lines, and addresses that kernels may read in large words

# elements whose squares are added at once: copies that a CPU's cache holds, few launches on a GPU
_NORM_PIECE = {"cpu": 2**18, "cuda": 2**24}


@dataclass(frozen=True)
class _Slot:
    """A parameter's place in its bucket."""

    name: str
    parameter: nn.Parameter
    start: int  # elements; a multiple of the alignment
    numel: int  # also while the parameter's data is elsewhere


class _Bucket:
    """Parameters whose gradients are reduced together. `weights` is their memory, in the order of `slots`."""

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], ranks: int, alignment: int) -> None:
        self.slots: list[_Slot] = []
        end = 0
        for name, parameter in parameters:
            self.slots.append(_Slot(name, parameter, end, parameter.numel()))
            end += _round_up(parameter.numel(), alignment)
        self.shard = _round_up(end, ranks * alignment) // ranks  # elements of each rank
        self.size = ranks * self.shard
        first = parameters[0][1]
        self.weights = torch.zeros(self.size, dtype=first.dtype, device=first.device)
        for slot in self.slots:
            place = self.weights.narrow(0, slot.start, slot.numel).view(slot.parameter.shape)
            place.copy_(slot.parameter.detach())
            slot.parameter.data = place
        self.missing = 0  # gradients that the current backward pass has not given yet
        self.sums: Tensor | None = None  # float32 [size], of this rank's gradients
        # set by `Zero`: of what this rank owns, its first element, its masters, and their gradients, float32; and these
        # where the masters are, which is in the host's memory with `parallel.offload`
        self.first = 0
        self.master: Stored = Float32((self.weights,), self.size)
        self.gradient = self.beside_masters = self.weights

    def sum_of(self, slot: _Slot) -> Tensor:
        """The float32 sums of a parameter's gradient, in its shape."""
        if self.sums is None:
            self.sums = torch.zeros(self.size, dtype=torch.float32, device=self.weights.device)
        return self.sums.narrow(0, slot.start, slot.numel).view(slot.parameter.shape)


class Zero:
    """A model's parameters, gradients and AdamW under stage 0, 1 or 2.

    The model's parameters move into the buckets. A gradient is taken as soon as the backward pass has it, so that
    `.grad` is None between passes; every parameter must get one. Lookups add those of their tables themselves, so a
    table is read by one lookup a pass. `settings`: AdamW's groups, as torch takes them.

    With `parallel.offload` masters and moments are in host memory. Gradients go there as soon as they are reduced, on a
    stream of their own, and each bucket's weights come back while the next one is updated.
    """

    def __init__(
        self, model: nn.Module, config: Config, groups: Groups, settings: list[dict[str, Any]]
    ) -> None:
        parallel = config.parallel
        self.stage = parallel.zero_stage
        self.group = groups.data
        self.degrees = groups.degrees
        self.ranks = groups.degrees.data
        self.rank = groups.degrees.data_rank
        self.gradient_clip = config.optimizer.gradient_clip
        self.overlap = parallel.overlap
        self.split = parallel.master == "split"
        self.reduce_dtype = getattr(torch, parallel.reduce_dtype)
        self.offload = parallel.offload == "optimizer"
        self.average_decay = config.training.average_decay
        device = next(model.parameters()).device
        self._down = torch.cuda.Stream(device) if self.offload and device.type == "cuda" else None
        named = list(model.named_parameters())
        self.moments = Moments(named, config.optimizer, self.degrees)
        # no shard cuts a unit of a table's numbers, where they are held by units
        self.alignment = math.lcm(_ALIGNMENT, *self.moments.units.values())
        self.buckets = [
            _Bucket(part, self.ranks, self.alignment) for part in _cut(reversed(named), parallel.bucket_size)
        ]
        self._bucket_of = {
            slot.name: index for index, bucket in enumerate(self.buckets) for slot in bucket.slots
        }
        owned: dict[str, Fragment] = {}
        for bucket in self.buckets:
            owned |= self._own(bucket)
        self._of_rank = {name: owned[name] for name, _ in named if name in owned}
        self.steps = 0  # updates so far, which the bias correction counts
        self._updated = self._find_updated(model, settings)
        self._adamw = AdamW(config.optimizer, config.training.seed, self.alignment, self.average_decay)
        self._fresh = True  # no gradient of this step has been taken
        self._norm: Tensor | None = None  # of this step's, once it is known
        self._last = True  # the backward pass is the step's last
        self._started = 0  # buckets whose reduction has, in their order
        self._reducing: deque[Callable[[], None]] = deque()
        self._gathering: dict[int, dist.Work] = {}
        self._hooks = [*self._take_gradients(), *self._wait_before_use(model)]

    # the step

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The backward pass of a micro-batch's share of the batch's loss; `update` follows the step's last."""
        self._last = last
        self._started = 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.slots)
        loss.backward()  # type: ignore[no-untyped-call]
        assert not any(bucket.missing for bucket in self.buckets), "a parameter got no gradient"
        if self._reduces:
            self._start_reductions(len(self.buckets))
        self._fresh = False

    def gradient_norm(self) -> Tensor:
        """The gradient's L2 norm before clipping, float32 []; `update` or `drop` follows. Collective, once a step.

        The squares are added in float64, so that how parameters lie on ranks does not show in the norm: float64 sums in
        another order differ in some 1e-16, of which nothing is left in float32 but once in about 10^8 steps.
        """
        if self._norm is not None:
            return self._norm
        while self._reducing:
            self._finish_reduction()
        if self._down is not None:
            torch.cuda.current_stream().wait_stream(self._down)
        self._norm = self._root_of_squares()
        return self._norm

    def update(self, learning_rate: float) -> Tensor:
        """Clip, update, and start to send the weights; returns `gradient_norm`."""
        norm = self.gradient_norm()
        if self._down is not None:
            self._down.synchronize()
        factor = None
        if self.gradient_clip:
            factor = (self.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
            factor = factor.to(self.buckets[0].beside_masters.device)  # once, since it may wait for a GPU
        self.steps += 1
        for index in self._in_order_of_use():
            if factor is not None:
                self.buckets[index].beside_masters.mul_(factor)
            self._adamw.update(self._updated[index], learning_rate, self.steps)
            self._send_weights(index)
        if not self.overlap:
            self._wait_for_all()
        self.drop()
        return norm

    def drop(self) -> None:
        """Forget the step's gradients: the next take their place. Weights, moments and `steps` stay as they are."""
        self._norm = None
        self._fresh = True

    # the state

    def fragments(self) -> dict[str, Fragment]:
        """This rank's fragment of every parameter that it owns a part of, by name in the model's order."""
        self._wait_for_all()  # in float32 the masters are weights, into which they are gathered
        return self._of_rank

    def gradient_sums(self) -> list[Tensor]:
        """The float32 sums of gradients that this rank keeps between steps: its own, and its part of all ranks'."""
        kept = (sums for bucket in self.buckets for sums in (bucket.sums, bucket.gradient))
        return list({id(sums): sums for sums in kept if sums is not None}.values())  # both may be one tensor

    def refresh_parameters(self) -> None:
        """Copy the masters into the parameters that the forward pass reads. Collective."""
        self._wait_for_all()
        for index in self._in_order_of_use():
            self._send_weights(index)
        self._wait_for_all()

    def close(self) -> None:
        """Leave the model without hooks, and nothing on its way."""
        self._wait_for_all()
        for hook in self._hooks:
            hook.remove()
        for bucket in self.buckets:
            for slot in bucket.slots:
                slot.parameter.__dict__.pop("gradient_sum", None)

    # set-up

    def _own(self, bucket: _Bucket) -> dict[str, Fragment]:
        """Masters, gradient and fragments of what this rank owns of a bucket."""
        bucket.first, owned = (
            (0, bucket.size) if self.stage == 0 else (self.rank * bucket.shard, bucket.shard)
        )
        mine = bucket.weights.narrow(0, bucket.first, owned)
        held = self._to_host(mine) if self.offload else mine
        if self.split:
            bucket.master = Split((held, torch.zeros(owned, dtype=torch.int16, device=held.device)), owned)
        else:
            bucket.master = Float32((held.float(),), owned)  # in float32 the same memory
        if self.stage == 2:
            bucket.gradient = torch.zeros(owned, device=mine.device)
        else:
            bucket.sums = torch.zeros(bucket.size, device=mine.device)
            whole = owned == bucket.size
            bucket.gradient = bucket.sums if whole else torch.zeros(owned, device=mine.device)
        bucket.beside_masters = self._to_host(bucket.gradient) if self.offload else bucket.gradient
        fragments = {}
        for slot in bucket.slots:
            first, end = max(slot.start, bucket.first), bucket.first + owned
            numel = min(slot.start + slot.numel, end) - first
            if numel > 0:
                # with the gap behind it: AdamW on a CPU rounds the last elements differently where they fill no vector
                filled = min(_round_up(slot.start + slot.numel, self.alignment), end) - first
                place = first - bucket.first
                values = {"master": bucket.master.narrow(place, filled)}
                values |= self.moments.zeros(slot.name, filled, held.device)
                if self.average_decay:
                    values[AVERAGE] = copy_of(values["master"])
                gradient = bucket.beside_masters.narrow(0, place, filled)
                fragments[slot.name] = Fragment(first - slot.start, numel, values, gradient)
        return fragments

    @staticmethod
    def _to_host(tensor: Tensor) -> Tensor:
        """A copy in the host's memory, pinned where it goes to and from a GPU."""
        pinned = tensor.device.type == "cuda"
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor)

    def _find_updated(self, model: nn.Module, settings: list[dict[str, Any]]) -> list[list[Updated]]:
        """What is updated of each bucket."""
        found: list[list[Updated]] = [[] for _ in self.buckets]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in settings:
            for name in (names[id(parameter)] for parameter in group["params"]):
                if (fragment := self._of_rank.get(name)) is not None:
                    places = self.moments.places(name, fragment.start)
                    decay, multiplier = group["weight_decay"], group["learning_rate_multiplier"]
                    found[self._bucket_of[name]].append(Updated(fragment, decay, multiplier, places))
        return found

    def _take_gradients(self) -> Iterator[RemovableHandle]:
        for bucket in self.buckets:
            for slot in bucket.slots:
                sums = _SumOf(self, bucket, slot)
                slot.parameter.gradient_sum = sums  # type: ignore[attr-defined]
                yield slot.parameter.register_post_accumulate_grad_hook(sums.take)

    def _wait_before_use(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Have each part of the model wait for its own weights, in its forward pass."""
        for prefix, part in _parts(model):
            needed = {self._bucket_of[f"{prefix}.{name}"] for name, _ in part.named_parameters()}
            yield part.register_forward_pre_hook(lambda *_, needed=needed: self._wait(needed))

    # gradients

    @property
    def _reduces(self) -> bool:
        return self._last or self.stage == 2

    def _have(self, bucket: _Bucket) -> None:
        """One more gradient has been added: start what has become complete, in the order that all ranks have."""
        bucket.missing -= 1
        if self._reduces and (self.overlap or self.stage == 2):
            complete = self._started
            while complete < len(self.buckets) and not self.buckets[complete].missing:
                complete += 1
            self._start_reductions(complete)

    def _start_reductions(self, end: int) -> None:
        """Of the buckets before `end` that have not started yet."""
        # stage 2 has own sums of two buckets at most: one that fills, and one that is on its way
        most = int(self.overlap) if self.stage == 2 else len(self.buckets)
        if self._down is not None:
            most = 0  # waited for on a stream of its own
        for bucket in self.buckets[self._started : end]:
            self._reducing.append(self._start_reduction(bucket))
            while len(self._reducing) > most:
                self._finish_reduction()
        self._started = max(self._started, end)

    def _finish_reduction(self) -> None:
        """Of those that were started the first. With offload its gradients go on to the host."""
        finish = self._reducing.popleft()
        if self._down is None:
            finish()
        else:
            self._down.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._down):
                finish()

    def _start_reduction(self, bucket: _Bucket) -> Callable[[], None]:
        """Returns what waits for the sums over ranks of this rank's shard and puts them where they belong."""
        sums, keep = bucket.sums, partial(self._keep, bucket, fresh=self._fresh)
        assert sums is not None
        if self.stage == 2:
            bucket.sums = None
        if self.ranks == 1:
            return partial(keep, sums)
        if self.reduce_dtype == torch.float32:
            shard = bucket.gradient if self.stage == 1 else sums.new_empty(bucket.shard)
            work = reduce_scatter(shard, sums, self.group)

            def finish() -> None:
                self._wait_for(work, "reduce-scatter of gradients")
                keep(shard)

        else:
            # sent as they are and added in float32: a collective that adds on its way would round R - 1 times
            received = torch.empty(bucket.size, dtype=self.reduce_dtype, device=sums.device)
            work = all_to_all(received, sums.to(self.reduce_dtype), self.group)

            def finish() -> None:
                self._wait_for(work, "all-to-all of gradients")
                self._used_by_copies(received)
                keep(received.view(self.ranks, -1).sum(0, dtype=torch.float32))

        return finish

    def _used_by_copies(self, tensor: Tensor) -> None:
        """Have the allocator wait for the copies' stream before it gives the memory to others."""
        if self._down is not None:
            tensor.record_stream(self._down)

    @torch.no_grad()
    def _keep(self, bucket: _Bucket, shard: Tensor, *, fresh: bool) -> None:
        self._used_by_copies(shard)
        if self.stage == 0 and self.ranks > 1:
            self._wait_for(all_gather(bucket.gradient, shard, self.group), "all-gather of gradients")
        elif self.stage == 2 and not fresh:
            bucket.gradient.add_(shard)
        elif shard is not bucket.gradient:
            bucket.gradient.copy_(shard)
        if self.offload and self._last:
            bucket.beside_masters.copy_(bucket.gradient, non_blocking=True)

    def _root_of_squares(self) -> Tensor:
        squares = torch.zeros((), dtype=torch.float64, device=self.buckets[0].weights.device)
        for bucket in self.buckets:
            first = self.rank * bucket.shard - bucket.first
            # stage 0: without what other ranks own as well
            mine = bucket.gradient.narrow(0, first, bucket.shard)
            for piece in mine.split(_NORM_PIECE[mine.device.type]):
                wide = piece.double()
                squares += wide.dot(wide)
        if self.degrees.world_size > 1:
            with collective("sum of the gradient's squares", squares.device):
                dist.all_reduce(squares)
        return squares.sqrt().float()

    # weights

    def _in_order_of_use(self) -> Iterable[int]:
        """Buckets, those first that the forward pass uses first."""
        return reversed(range(len(self.buckets)))

    @torch.no_grad()
    def _send_weights(self, index: int) -> None:
        """Start to send a bucket from the masters that each rank owns to every rank's parameters."""
        bucket = self.buckets[index]
        mine = bucket.weights.narrow(0, bucket.first, bucket.master.numel)
        weights = bucket.master.tensors[0]  # split ones: in the weights' dtype
        if mine.data_ptr() != weights.data_ptr():
            mine.copy_(weights, non_blocking=True)
        if self.stage and self.ranks > 1:
            self._gathering[index] = all_gather(bucket.weights, mine, self.group)

    def _wait_for(self, work: dist.Work, name: str) -> None:
        with collective(name, self.buckets[0].weights.device):
            work.wait()

    def _wait_for_all(self) -> None:
        self._wait(range(len(self.buckets)))

    def _wait(self, buckets: Iterable[int]) -> None:
        for index in buckets if self._gathering else ():
            if work := self._gathering.pop(index, None):
                self._wait_for(work, "all-gather of weights")


@dataclass(frozen=True)
class _SumOf:
    """Where a parameter's gradients are added up (`mf_train.kernels.GradientSum`): by its lookup, or by `take`."""

    zero: Zero
    bucket: _Bucket
    slot: _Slot

    def begin(self) -> Sum:
        return self.bucket.sum_of(self.slot), not (self.zero._fresh or self.zero.stage == 2)

    def done(self) -> None:
        self.zero._have(self.bucket)

    @torch.no_grad()
    def take(self, parameter: nn.Parameter) -> None:
        """Add the parameter's `.grad` and remove it. torch calls this also after a lookup that added it itself."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            add_to([self.begin()], [gradient])
            self.done()


def _cut(parameters: Iterable[tuple[str, nn.Parameter]], size: int) -> list[list[tuple[str, nn.Parameter]]]:
    """Parameters in order, in lists of at least `size` elements each but the last."""
    cut: list[list[tuple[str, nn.Parameter]]] = []
    elements = size
    for name, parameter in parameters:
        if elements >= size:
            cut.append([])
            elements = 0
        cut[-1].append((name, parameter))
        elements += parameter.numel()
    return cut


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that the model calls itself, by name: a list of modules is not called, its members are."""
    parts = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            parts += [(f"{name}.{index}", member) for index, member in child.named_children()]
        else:
            parts.append((name, child))
    return parts


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
