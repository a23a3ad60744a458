"""What each step of a run did for its time: FLOPs, bytes, and their shares of what the devices could do at most."""

from mf_train.config import Config
from mf_train.planning.devices import Peak
from mf_train.planning.traffic import data_parallel_bytes_per_token
from mf_train.planning.work import model_flops, paper_flops, step_bytes, step_tokens


def step_efficiency(
    config: Config, processes: int, peak: Peak | None, seconds: float
) -> dict[str, float | None]:
    """Keys of metrics.jsonl for a step of `seconds`, of all ranks together.

    `paper_flops`: multiply-adds of the blocks' forward pass, as Table 1 counts them. `model_flops`: FLOPs of training,
    blocks and LM head, 6 for each multiply-add. `bytes_moved`: of memory, counted by `planning.work.step_bytes`.
    `flops_share` and `bandwidth_share`: of the devices' peak (data sheet, `find_peak`); None where that is not known,
    as for every CPU. Rows are counted each time they are read, so a cache that serves them raises `bandwidth_share`,
    in the extreme above 1. `data_parallel_bytes_per_token`: what a rank sends for each of its tokens, computed.
    """
    tokens, model = step_tokens(config), config.model
    flops, moved = tokens * model_flops(model), step_bytes(config)
    device_seconds = processes * seconds
    data = processes // config.parallel.tensor
    return {
        "paper_flops": tokens * paper_flops(model),
        "model_flops": flops,
        "bytes_moved": moved,
        "flops_share": flops / device_seconds / peak.flops[config.training.precision] if peak else None,
        "bandwidth_share": moved / device_seconds / peak.memory if peak else None,
        "data_parallel_bytes_per_token": data_parallel_bytes_per_token(config, data),
    }
