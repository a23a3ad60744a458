"""How AdamW's moments of each parameter are held (`optimizer.table_exp_avg`, `optimizer.table_exp_avg_sq`)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mf_train.config import OptimizerConfig
from mf_train.model.sharding import split_dimension
from mf_train.model.sums import num_chunks
from mf_train.parallel.degrees import Degrees
from mf_train.parallel.stored import Places, Stored, zeros


class Moments:
    """Of tables and of the embedding, which is one too: as the keys say; of all others, which are few: in float32.

    `named`: the model's parameters, with the shapes of this tensor-parallel rank. `units`: of each (`Stored`); 1 where
    a moment is held in float32.
    """

    def __init__(
        self, named: Iterable[tuple[str, Tensor]], config: OptimizerConfig, degrees: Degrees
    ) -> None:
        self.degrees = degrees
        self.kinds = {"exp_avg": config.table_exp_avg, "exp_avg_sq": config.table_exp_avg_sq}
        self.compact = config.compact_moments
        self.rounded = bool({*self.kinds.values()} & {"bfloat16", "int8"})
        self.units: dict[str, int] = {}
        self._columns: dict[str, int] = {}
        for name, parameter in named:
            columns = parameter.shape[-1] * degrees.tensor
            table = split_dimension(name) == parameter.dim() - 1 > 0
            self.units[name] = columns // num_chunks(columns) if table and self.compact else 1
            self._columns[name] = columns

    def zeros(self, name: str, numel: int, device: torch.device) -> dict[str, Stored]:
        """Both moments of `numel` of a parameter's numbers."""
        unit = self.units[name]
        return {
            moment: zeros(kind if unit > 1 else "float32", moment, numel, unit, device)
            for moment, kind in self.kinds.items()
        }

    def places(self, name: str, start: int) -> Places | None:
        """Of a fragment that begins with the rank's number `start`; None where nothing is rounded at random."""
        unit = self.units[name]
        if unit == 1 or not self.rounded:
            return None
        units = self._columns[name] // unit
        mine = units // self.degrees.tensor
        return Places(name, unit, units, mine, mine * self.degrees.tensor_rank, start // unit)
