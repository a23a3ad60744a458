"""Sizes of a model by one dial, its depth: d layers of d * width features."""

WIDTH = 64  # with it 12 layers have the features of the paper's small; its tiny is wider for its depth, its base deeper


def ladder_size(depth: int, width: int, head_size: int) -> dict[str, int]:
    """Keys of the section `model` at a depth, in heads of `head_size` features, which must divide depth * width."""
    return {"num_layers": depth, "hidden_size": depth * width, "num_heads": depth * width // head_size}


def shared_size(depth: int) -> dict[str, int]:
    """Of WIDTH features a layer, in a multiple of 8 heads, so that P = 8 can share them.

    A head has 64 features, or as few more as divide them evenly; 8 layers and fewer have 8 heads. `depth`: even.
    """
    eighths = max(part for part in range(1, max(1, depth // 8) + 1) if 4 * depth % part == 0)
    return ladder_size(depth, WIDTH, WIDTH * depth // (8 * eighths))
