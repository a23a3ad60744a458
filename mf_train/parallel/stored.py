"""How a rank holds the float32 numbers behind a parameter: master weights and moments, in 4 bytes or in fewer.

    float32     as they are
    bfloat16    their upper 16 bits, rounded at random so that the mean is right
    int8        a byte each, and a float32 for each unit: its largest magnitude
    row         one float32 for each unit: the mean
    split       the parameter's bfloat16 weight, and the 16 bits that it lacks

A unit is what a row of a table has in one of the up to 8 chunks of columns (`mf_train.model.sums`). Neither tensor
parallelism nor the buckets of `mf_train.parallel.zero` cut one, so what is held does not depend on the ranks. Where
numbers are rounded at random (Gupta et al. 2015, arXiv 1502.02551), the random bits are a function of (seed, step,
name, place in the whole parameter) alone. Blocks with a scale of their own are those of 8-bit optimisers (Dettmers et
al. 2022, arXiv 2110.02861); the codes here are powers, k^2 for a first moment and k^4 for a second, in place of a list.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mf_train.kernels.adamw import Draw, Held, layout
from mf_train.parallel.kinds import MOMENTS


@dataclass(frozen=True)
class Stored(ABC):
    """Numbers [numel] on a device. `unit` divides where they may be cut; `kind`: one of `parallel.kinds.BYTES`."""

    kind: ClassVar[str]
    tensors: tuple[Tensor, ...]
    numel: int
    unit: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def held(self) -> Held:
        """As the kernels take it."""
        return Held(self.kind, self.tensors)

    @abstractmethod
    def read(self) -> Tensor:
        """The numbers, float32 [numel]; a view where they are held so."""

    @abstractmethod
    def write(self, values: Tensor, bits: Tensor | None = None) -> None:
        """Hold float32 [numel]. `bits`: random ones, int32 [numel], of which the lower 16 count; None: to nearest."""

    def narrow(self, first: int, numel: int) -> "Stored":
        """A view of the numbers [first, first + numel), in whole units."""
        assert first % self.unit == numel % self.unit == 0
        parts = tuple(
            tensor.narrow(0, first * tensor.numel() // self.numel, numel * tensor.numel() // self.numel)
            for tensor in self.tensors
        )
        return type(self)(parts, numel, self.unit)

    def pieces(self, size: int = 2**24) -> Iterator[tuple[int, int]]:
        """First place and length of pieces, as `cut`; by default of what a save or a load has in float32 at once."""
        return cut(self.numel, size, self.unit)


class Float32(Stored):
    kind = "float32"

    def read(self) -> Tensor:
        return self.tensors[0]

    def write(self, values: Tensor, bits: Tensor | None = None) -> None:
        if values.data_ptr() != self.tensors[0].data_ptr():  # else updated where it is
            self.tensors[0].copy_(values)


class Bfloat16(Stored):
    kind = "bfloat16"

    def read(self) -> Tensor:
        return self.tensors[0].float()

    def write(self, values: Tensor, bits: Tensor | None = None) -> None:
        if bits is None:
            self.tensors[0].copy_(values)
        else:
            # the sum carries into the upper half as often as the lower half is large
            carried = values.view(torch.int32) + (bits & 0xFFFF)
            self.tensors[0].view(torch.int16).copy_(carried.view(torch.int16)[1::2])


class _Int8(Stored):
    """Codes k, uint8 or int8 [numel], and the largest magnitude m, float32 [numel / unit]: m (k / most)^power."""

    kind = "int8"
    most: int

    def read(self) -> Tensor:
        codes, largest = self.tensors
        k = codes.view(-1, self.unit).float().mul_(1 / self.most)
        return self._raise(k).mul_(largest[:, None]).view(-1)

    def write(self, values: Tensor, bits: Tensor | None = None) -> None:
        codes, largest = self.tensors
        by_unit = values.view(-1, self.unit)
        torch.amax(by_unit.abs(), 1, out=largest)
        share = by_unit.abs() / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        root = self._root(share).mul_(self.most)
        if bits is None:
            k = root.round_()
        else:
            k = root.floor()
            below, above = self._raise(k / self.most), self._raise((k + 1) / self.most)
            chance = (share - below).div_(above.sub_(below))
            k += (bits.view(-1, self.unit) & 0xFFFF) < chance.mul_(2**16)
            k.clamp_(max=self.most)
        codes.copy_(self._signed(k, by_unit).view(-1))

    @abstractmethod
    def _raise(self, k: Tensor) -> Tensor: ...

    @abstractmethod
    def _root(self, share: Tensor) -> Tensor: ...

    @abstractmethod
    def _signed(self, k: Tensor, values: Tensor) -> Tensor: ...


class Int8First(_Int8):
    """Of either sign: m k |k| / 127^2."""

    most = 127

    def _raise(self, k: Tensor) -> Tensor:
        return k * k.abs()

    def _root(self, share: Tensor) -> Tensor:
        return share.sqrt()

    def _signed(self, k: Tensor, values: Tensor) -> Tensor:
        return k.copysign_(values)


class Int8Second(_Int8):
    """Not negative: m (k / 255)^4. Only 0 is held as 0: an update divides by the root of what is held."""

    most = 255

    def _raise(self, k: Tensor) -> Tensor:
        return k.square().square_()

    def _root(self, share: Tensor) -> Tensor:
        return share.sqrt().sqrt_()

    def _signed(self, k: Tensor, values: Tensor) -> Tensor:
        return torch.maximum(k, (values > 0).to(k.dtype))


class Row(Stored):
    kind = "row"

    def read(self) -> Tensor:
        return self.tensors[0].repeat_interleave(self.unit)

    def write(self, values: Tensor, bits: Tensor | None = None) -> None:
        by_unit = values.view(-1, self.unit)
        least = by_unit.amin(1)
        self.tensors[0].copy_(least + (by_unit - least[:, None]).mean(1))  # equal numbers: to the last bit


class Split(Stored):
    """tensors: the weights, bfloat16, each the one nearest to its number, and what is left of the number's bits, int16.

    Of two weights that are equally near, bfloat16 takes the even one; where that is the lower, the number loses its
    last bit, because the half above does not fit into 16 bits.
    """

    kind = "split"

    def read(self) -> Tensor:
        weights, left = self.tensors
        bits = weights.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
        return bits.add_(left).view(torch.float32)

    def write(self, values: Tensor, bits: Tensor | None = None) -> None:
        weights, left = self.tensors
        weights.copy_(values)
        upper = weights.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
        left.copy_((values.view(torch.int32) - upper).clamp_(-(2**15), 2**15 - 1))


def cut(numel: int, size: int, unit: int) -> Iterator[tuple[int, int]]:
    """First place and length of pieces of about `size` of so many numbers, each but the last in whole units."""
    size = max(unit, size // unit * unit)
    for first in range(0, numel, size):
        yield first, min(size, numel - first)


def zeros(kind: str, name: str, numel: int, unit: int, device: torch.device) -> Stored:
    """Zeros of a moment `name` (exp_avg, exp_avg_sq), held as `kind`."""
    second = name == MOMENTS[1]
    int8 = Int8Second if second else Int8First
    classes = {"float32": Float32, "bfloat16": Bfloat16, "int8": int8, "row": Row}
    tensors = (
        torch.zeros(size, dtype=dtype, device=device)
        for dtype, size in layout(kind, numel, unit, second=second)
    )
    return classes[kind](tuple(tensors), numel, unit)


def copy_of(master: Stored) -> Float32:
    """The same numbers in float32, in memory of their own: an average begins so."""
    return Float32((master.read().clone(),), master.numel)


@dataclass(frozen=True)
class Places:
    """Where a rank's units are in a whole parameter, for random bits that do not depend on the ranks.

    A row has `units` of them, of which this rank has `mine` from `first` on; `start`: the rank's first, of its own.
    """

    name: str
    unit: int
    units: int
    mine: int
    first: int
    start: int

    def draw(self, seed: int, step: int, first: int) -> Draw:
        """What the random bits of the rank's numbers from `first` on, in whole units, are drawn from."""
        digest = hashlib.blake2b(f"{seed}/{step}/{self.name}".encode(), digest_size=8).digest()
        low, high = (int.from_bytes(half, "little") for half in (digest[:4], digest[4:]))
        return Draw(low, high, self.start + first // self.unit, self.mine, self.units, self.first)

    def bits(self, seed: int, step: int, first: int, numel: int, device: torch.device) -> Tensor:
        """Random int32 [numel] for the numbers [first, first + numel) of the rank's, in whole units."""
        draw = self.draw(seed, step, first)
        units = torch.arange(draw.begin, draw.begin + numel // self.unit, device=device)
        places = units // draw.mine * draw.units + units % draw.mine + draw.first
        low, high = draw.signed_keys
        keys = _mix(_mix(places.to(torch.int32) + low) + high)
        columns = torch.arange(self.unit, dtype=torch.int32, device=device) * -0x61C88647
        return _mix((keys[:, None] + columns).view(-1))


def _mix(x: Tensor) -> Tensor:
    """A hash of each int32, in place: lowbias32 of C. Wellons (nullprogram.com/blog/2018/07/31)."""
    x ^= (x >> 16) & 0xFFFF  # torch shifts the sign in
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x
