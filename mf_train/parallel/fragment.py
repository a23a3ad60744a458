"""What a rank keeps of a parameter's float32 state, whatever the ZeRO stage."""

from dataclasses import dataclass

from torch import Tensor

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
