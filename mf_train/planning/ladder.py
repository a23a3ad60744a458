"""Sizes of a model by one dial, its depth: d layers of d * width features, in heads of `head_size` features."""

WIDTH = HEAD_SIZE = (
    64  # with these 12 layers are the paper's small; its tiny is wider for its depth, its base deeper
)


def ladder_size(depth: int, width: int = WIDTH, head_size: int = HEAD_SIZE) -> dict[str, int]:
    """Keys of the section `model` at a depth; `head_size` must divide depth * width."""
    features = depth * width
    return {"num_layers": depth, "hidden_size": features, "num_heads": features // head_size}
