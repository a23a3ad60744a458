"""The numbers that a rank keeps of a parameter, and the bytes that they take. Imports no torch."""

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state beside its count of steps
KINDS = ("master", *MOMENTS)
AVERAGE = "average"  # of the masters, float32, beside KINDS where `training.average_decay` asks for it
# of each number and of each unit of numbers, by how they are held; a split master's are those beside its weight
BYTES = {"float32": (4, 0), "bfloat16": (2, 0), "int8": (1, 4), "row": (0, 4), "split": (2, 0)}
# numbers that an update turns into float32 at once: what a CPU's cache holds, few launches on a GPU
PIECE = {"cpu": 2**18, "cuda": 2**22}


def kept_kinds(average_decay: float) -> tuple[str, ...]:
    """What a run keeps of every parameter."""
    return (*KINDS, AVERAGE) if average_decay else KINDS


def held_bytes(kind: str, unit: int = 1) -> float:
    """Bytes of a number that is held as `kind` (`mf_train.parallel.stored`) in units of `unit` numbers."""
    of_number, of_unit = BYTES[kind]
    return of_number + of_unit / unit
