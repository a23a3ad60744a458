"""What counts of reads say of tables: one row of numbers a table, and their summary for a hash."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The columns of a table's numbers; then follows the balance of each bit.
READS, ROWS_READ, ENTROPY, GINI, LARGEST, BITS = range(6)


def table_numbers(counts: Tensor) -> Tensor:
    """Of each table from its counts int64 [K, 2**tau]: float64 [K, 5 + tau], on the counts' device.

    Reads; share of rows read at least once; entropy of the codes as a share of tau bits; Gini coefficient of the
    reads (0: all rows equally often, 1 - 2**-tau: one row only); the most read row's share; and of each bit the share
    of codes in which it is 1, less 1/2. A table that was not read has zeros.
    """
    rows = counts.shape[-1]
    tau = rows.bit_length() - 1
    counts = counts.double()
    reads = counts.sum(-1, keepdim=True)
    shares = counts / reads.clamp(min=1)
    entropy = torch.special.entr(shares).sum(-1) / math.log(rows)
    place = torch.arange(1 - rows, rows, 2, dtype=torch.float64, device=counts.device)  # 2i - rows - 1
    gini = (shares.sort(-1).values * place).sum(-1) / rows
    row = torch.arange(rows, device=counts.device)
    bit = (row.unsqueeze(-1) >> torch.arange(tau, device=counts.device) & 1).double()
    balance = shares @ bit - 0.5
    balance = torch.where(reads > 0, balance, 0.0)
    columns = (reads[:, 0], (counts > 0).double().mean(-1), entropy, gini, shares.amax(-1))
    return torch.cat((torch.stack(columns, dim=-1), balance), dim=-1)


@dataclass(frozen=True)
class HashStatistics:
    """A hash's tables: `numbers` float64 [K, 5 + tau] as `table_numbers` gives them, on the CPU."""

    name: str
    numbers: Tensor

    @property
    def bits(self) -> int:
        return self.numbers.shape[1] - BITS

    def columns(self) -> dict[str, Tensor]:
        """[K] by name: the numbers of each table but its bits'."""
        return {
            "rows_read": self.numbers[:, ROWS_READ],
            "entropy": self.numbers[:, ENTROPY],
            "gini": self.numbers[:, GINI],
            "largest_share": self.numbers[:, LARGEST],
        }

    def summary(self) -> dict[str, Any]:
        """Over the tables: the mean but for `largest_share`, the largest.

        `rows_read`, `entropy`, `gini`, `largest_share`: as in `table_numbers`. `bit_imbalance`: |share of ones - 1/2|,
        the mean over a table's bits. `bit_imbalance_worst`: of a table's worst bit. `bit_imbalances`: of each bit.
        """
        columns, imbalance = self.columns(), self.numbers[:, BITS:].abs()
        largest = columns.pop("largest_share").max().item()
        return {name: values.mean().item() for name, values in columns.items()} | {
            "largest_share": largest,
            "bit_imbalance": imbalance.mean().item(),
            "bit_imbalance_worst": imbalance.amax(-1).mean().item(),
            "bit_imbalances": [round(value, 4) for value in imbalance.mean(0).tolist()],
        }
