"""How tensor parallelism splits a parameter: each of P ranks holds one of P equal slices along one dimension."""

from collections.abc import Iterator, Sequence

from torch import Tensor

Shape = tuple[int, ...]


def split_dimension(name: str) -> int:
    """The dimension of a parameter that is split: columns of tables and embedding, rows of everything else."""
    if name.endswith(".tables"):
        return 2
    return 1 if name == "embedding.weight" else 0


def slice_shape(name: str, shape: Sequence[int], ranks: int) -> Shape:
    """Shape of each rank's slice of a parameter of the whole shape `shape`."""
    dimension = split_dimension(name)
    return (*shape[:dimension], shape[dimension] // ranks, *shape[dimension + 1 :])


def whole_shape(name: str, shape: Sequence[int], ranks: int) -> Shape:
    """Shape of the parameter of which each rank holds a slice of shape `shape`."""
    dimension = split_dimension(name)
    return (*shape[:dimension], shape[dimension] * ranks, *shape[dimension + 1 :])


def slice_of_rank(tensor: Tensor, name: str, rank: int, ranks: int) -> Tensor:
    """The view of a whole parameter that rank `rank` holds."""
    dimension = split_dimension(name)
    width = tensor.shape[dimension] // ranks
    return tensor.narrow(dimension, rank * width, width)


def ranks_of_span(span: slice, width: int) -> Iterator[tuple[int, int, int]]:
    """Who holds a span of the split dimension, of which each rank has `width`: (rank, first, last) in the whole."""
    for rank in range(span.start // width, -(-span.stop // width)):
        yield rank, max(span.start, rank * width), min(span.stop, (rank + 1) * width)
