"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over fragments whose numbers may be held in fewer bytes.

What is held in float32 is updated where it is, by torch's fused AdamW. Compact moments are updated by a kernel in one
pass. Where there is none, and for split masters beside float32 moments, what is held is turned into float32 piece by
piece, updated and held again, so that little is ever in float32 at once.

With a second moment of one number a row (`row`), the mean of a unit's squared gradients takes the place of each square,
as recommender systems train their tables (row-wise Adam of FBGEMM, after the row-wise AdaGrad of Mudigere et al. 2022,
arXiv 2104.05158).

An exponential average of the masters (Polyak and Juditsky 1992) follows each update where a fragment keeps one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mf_train.config import OptimizerConfig
from mf_train.kernels import fast_adamw
from mf_train.kernels.adamw import Draw, Rates
from mf_train.parallel.fragment import Fragment
from mf_train.parallel.kinds import AVERAGE, KINDS, MOMENTS, PIECE
from mf_train.parallel.stored import Places, Stored, cut


@dataclass(frozen=True)
class Updated:
    """A fragment that has a gradient, and its group's settings."""

    fragment: Fragment
    weight_decay: float
    multiplier: float  # of the learning rate
    places: Places | None  # where moments are rounded at random

    @property
    def gradient(self) -> Tensor:
        assert self.fragment.gradient is not None
        return self.fragment.gradient

    @property
    def plain(self) -> bool:
        """Whether everything is in float32."""
        return all(self.fragment.values[kind].kind == "float32" for kind in KINDS)

    @property
    def compact(self) -> bool:
        """Whether a moment takes fewer bytes."""
        return any(self.fragment.values[kind].kind != "float32" for kind in MOMENTS)


class AdamW:
    """The update of fragments. Those with compact numbers are cut at multiples of `alignment`, which units divide.

    On CPUs torch rounds the last elements of a tensor otherwise where they fill no vector, so where bits matter lengths
    and `alignment` are multiples of 64. `seed`: of random bits. `average_decay`: d of d average + (1 - d) master.
    """

    def __init__(
        self, config: OptimizerConfig, seed: int, alignment: int, average_decay: float = 0.0
    ) -> None:
        self.config = config
        self.seed = seed
        self.alignment = alignment
        self.average_decay = average_decay

    @torch.no_grad()
    def update(self, updated: Iterable[Updated], learning_rate: float, step: int) -> None:
        """Update each in place; `step` counts from 1."""
        updated = list(updated)
        plain: dict[tuple[float, float], list[Updated]] = {}
        for each in updated:
            if each.plain:
                plain.setdefault((each.weight_decay, each.multiplier), []).append(each)
            elif each.compact and (kernel := fast_adamw(each.gradient)) is not None:
                rate = learning_rate * each.multiplier
                rates = Rates.of_step(rate, each.weight_decay, self.config.betas, self.config.eps, step)
                draw = Draw(0, 0, 0, 1, 1, 0) if each.places is None else each.places.draw(self.seed, step, 0)
                held = [each.fragment.values[kind] for kind in KINDS]
                kernel.update(each.gradient, held[1].unit, *(numbers.held for numbers in held), rates, draw)
            else:
                self._update_pieces(each, learning_rate * each.multiplier, step)
        for (weight_decay, multiplier), together in plain.items():
            values = [[each.fragment.values[kind].read() for each in together] for kind in KINDS]
            gradients = [each.gradient for each in together]
            self._fused(gradients, values, learning_rate * multiplier, weight_decay, step)
        for each in updated:
            if (average := each.fragment.values.get(AVERAGE)) is not None:
                self._follow(average.read(), each.fragment.values["master"])

    def _follow(self, average: Tensor, master: Stored) -> None:
        """Move an average, float32, towards the masters that were updated; in pieces, since a split one is copied."""
        for first, numel in cut(master.numel, PIECE[average.device.type], self.alignment):
            average.narrow(0, first, numel).lerp_(master.narrow(first, numel).read(), 1 - self.average_decay)

    def _fused(
        self,
        gradients: list[Tensor],
        values: list[list[Tensor]],
        learning_rate: float,
        weight_decay: float,
        step: int,
    ) -> None:
        """`values`: masters, first and second moments, all float32."""
        masters, averages, squares = values
        before = torch.full((len(masters),), step - 1.0, device=masters[0].device)
        adamw(
            masters,
            gradients,
            averages,
            squares,
            [],
            list(before.unbind()),  # it counts each of them up
            fused=True,
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=self.config.eps,
            maximize=False,
        )

    def _update_pieces(self, each: Updated, learning_rate: float, step: int) -> None:
        device = each.gradient.device
        for first, numel in cut(each.gradient.numel(), PIECE[device.type], self.alignment):
            gradient = each.gradient.narrow(0, first, numel)
            master, average, square = (each.fragment.values[kind].narrow(first, numel) for kind in KINDS)
            values = [master.read(), average.read()]
            if square.kind == "row":
                self._update_by_row(
                    gradient, values[0], values[1], square, learning_rate, each.weight_decay, step
                )
            else:
                values.append(square.read())
                self._fused([gradient], [[value] for value in values], learning_rate, each.weight_decay, step)
            bits = None
            if each.places is not None:
                bits = each.places.bits(self.seed, step, first, numel, device)
            master.write(values[0])
            average.write(values[1], bits)
            if len(values) == 3:
                square.write(values[2], None if bits is None else bits >> 16)  # the other half

    def _update_by_row(
        self,
        gradient: Tensor,
        master: Tensor,
        average: Tensor,
        rows: Stored,
        learning_rate: float,
        weight_decay: float,
        step: int,
    ) -> None:
        beta1, beta2 = self.config.betas
        (square,) = rows.tensors
        by_unit = (-1, rows.unit)
        square.mul_(beta2).add_(gradient.view(by_unit).square().mean(1), alpha=1 - beta2)
        average.lerp_(gradient, 1 - beta1)
        root = (square.sqrt() / math.sqrt(1 - beta2**step)).add_(self.config.eps)
        master.mul_(1 - learning_rate * weight_decay)
        rate = learning_rate / (1 - beta1**step)
        master.view(by_unit).addcdiv_(average.view(by_unit), root[:, None], value=-rate)
