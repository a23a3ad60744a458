"""How evenly the tables' rows are read in one step (the paper's Figure 4, as numbers)."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mf_train.model.memory import Hash


class TableTelemetry:
    """Counts the codes of every hash between `start` and `finish`; counts nothing outside."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self.group = group
        self.hashes = {name: module for name, module in model.named_modules() if isinstance(module, Hash)}
        self.counts: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def start(self) -> None:
        for name, module in self.hashes.items():
            self._handles.append(module.register_forward_hook(self._counter(name, 2**module.bits)))

    def finish(self) -> dict[str, dict[str, float]]:
        """Per hash, over its tables and all data-parallel ranks' tokens since `start`. Collective.

        `rows_read`: share of rows read at least once. `entropy`: mean entropy of a table's codes, as a share of
        tau bits. `largest_share`: the most often read row's share of its table's reads.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        report = {}
        for name, counts in self.counts.items():
            dist.all_reduce(counts, group=self.group)
            shares = counts.double() / counts.sum(-1, keepdim=True)
            entropy = (
                -torch.special.xlogy(shares, shares).sum(-1).mean() / torch.tensor(counts.shape[-1]).log()
            )
            report[name] = {
                "rows_read": (counts > 0).double().mean().item(),
                "entropy": entropy.item(),
                "largest_share": shares.max().item(),
            }
        self.counts.clear()
        return report

    def _counter(self, name: str, rows: int) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor]) -> None:
            codes = outputs[0].detach().flatten(0, -2).long()
            tables = codes.shape[-1]
            flat = (codes + torch.arange(tables, device=codes.device) * rows).flatten()
            counts = torch.bincount(flat, minlength=tables * rows).view(tables, rows)
            self.counts[name] = self.counts[name] + counts if name in self.counts else counts

        return count
