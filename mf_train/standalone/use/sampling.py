"""Which token comes next: the likeliest, or one that is drawn from a part of the distribution."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mf_train.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen of logits. Raises UserError naming the option.

    `repetition_penalty` divides the logits above 0 of tokens that are there already, and multiplies those below (CTRL,
    arXiv 1909.05858). `temperature` 0 takes the likeliest token; else tokens are drawn from
    softmax(logits / temperature): of the `top_k` likeliest (0: of all), and of those from the fewest likeliest whose
    probabilities add up to `top_p` (nucleus, arXiv 1904.09751). transformers' `generate` has the same order.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature is {self.temperature}: it must be 0 or more")
        if self.top_k < 0:
            raise UserError(f"--top-k is {self.top_k}: it must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}: it must be above 0 and at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"--repetition-penalty is {self.repetition_penalty}: it must be above 0")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise UserError(
                "--top-k and --top-p choose among tokens that are drawn: give --temperature above 0"
            )

    def choose(self, logits: Tensor, seen: Sequence[int], generator: torch.Generator) -> int:
        """A token of logits [V], float32; `seen` are the tokens so far. Raises UserError for none that is finite."""
        given = logits
        if self.repetition_penalty != 1 and seen:
            places = torch.tensor(seen)
            found = logits[places]
            penalty = self.repetition_penalty
            logits = logits.clone()
            logits[places] = torch.where(found > 0, found / penalty, found * penalty)
        highest = logits.max()  # nan where one of them is
        if not highest.isfinite():
            raise self._not_finite(given)
        if self.temperature == 0:
            return int(logits.argmax())
        # Less the highest, which leaves the distribution as it is, no temperature makes them infinite. In float64,
        # because float32 takes one below 1e-45 for 0.
        logits = ((logits - highest).double() / self.temperature).float()
        if self.top_k:
            least = logits.topk(min(self.top_k, len(logits))).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, places = probabilities.sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            probabilities = probabilities.index_fill(0, places[before >= self.top_p], 0.0)
        return int(torch.multinomial(probabilities, 1, generator=generator))

    def _not_finite(self, given: Tensor) -> UserError:
        """What is to blame for logits of which the highest is not finite: the penalty, or the `given` ones."""
        if given.isfinite().all():
            return UserError(
                f"--repetition-penalty is {self.repetition_penalty}: float32 cannot hold the logits that it makes: "
                "give one nearer to 1"
            )
        return UserError(
            "the model's logits are not finite: its training diverged, or its weights are damaged; convert an earlier "
            "checkpoint"
        )
