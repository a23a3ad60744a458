"""Restoring an engine from a checkpoint of any degrees and stage: each rank reads the fragments that it keeps."""

from collections.abc import Callable

from mf_train.checkpoint.read import CheckpointReader
from mf_train.errors import UserError
from mf_train.model.sharding import whole_shape
from mf_train.parallel.agreement import run_on_all
from mf_train.parallel.engine import Engine
from mf_train.parallel.kinds import AVERAGE


def load_checkpoint(
    engine: Engine, reader: CheckpointReader, still_alive: Callable[[], None] = lambda: None
) -> None:
    """Set masters, moments and the count of updates of an engine. Collective; `still_alive` is called after each read.

    An average of the weights that the checkpoint does not hold begins at its weights.

    Raises UserError where the checkpoint is of another model.
    """
    run_on_all(lambda: _check_shapes(engine, reader), engine.device)
    run_on_all(lambda: _read_fragments(engine, reader, still_alive), engine.device)
    engine.reset_step(reader.manifest.step - reader.state().get("skipped_steps", 0))
    engine.refresh_parameters()


def _read_fragments(engine: Engine, reader: CheckpointReader, still_alive: Callable[[], None]) -> None:
    degrees = engine.groups.degrees
    for name, fragment in engine.fragments().items():
        for kind in engine.kinds:
            held = fragment.held(kind)
            source = "master" if kind == AVERAGE and kind not in reader.manifest.kinds else kind
            for first, numel in held.pieces():
                start = fragment.start + first
                values = reader.read_fragment(name, source, degrees.tensor_rank, degrees.tensor, start, numel)
                held.narrow(first, numel).write(values.to(held.tensors[0].device))
            still_alive()


def _check_shapes(engine: Engine, reader: CheckpointReader) -> None:
    ours = {
        name: whole_shape(name, engine.local_shape(parameter), engine.groups.degrees.tensor)
        for name, parameter in engine.model.named_parameters()
    }
    if ours != reader.shapes:
        differing = sorted(n for n in {*ours, *reader.shapes} if ours.get(n) != reader.shapes.get(n))
        name = differing[0]
        raise UserError(
            f"{reader.checkpoint}: of another model: {name} is {reader.shapes.get(name)} there and {ours.get(name)} "
            "in this configuration"
        )
