"""MosaicML Streaming's side of `benchmarks.data`; run by the Python of an environment that has mosaicml-streaming.

`data_streaming.py FOLDER write BIN DTYPE` makes an MDS data set of the .bin's samples of 2048 tokens;
`data_streaming.py FOLDER read BATCHES` prints the tokens a second of reading it in shuffled order.
"""

import sys
import time

import numpy as np
from streaming import MDSWriter, StreamingDataset

SEQUENCE, BATCH = 2048, 8
WARM_UP = 40  # batches


def write(folder: str, path: str, dtype: str) -> None:
    name = np.dtype(dtype).name
    samples = np.memmap(path, dtype, "r").reshape(-1, SEQUENCE)
    with MDSWriter(out=folder, columns={"tokens": f"ndarray:{name}:{SEQUENCE}"}) as writer:
        for sample in samples:
            writer.write({"tokens": sample})


def read(folder: str, steps: int) -> float:
    """Tokens a second, without opening: the order of samples is made before the first one comes."""
    samples = endless(StreamingDataset(local=folder, shuffle=True, batch_size=BATCH))
    for _ in range(WARM_UP):
        next_batch(samples)
    start = time.perf_counter()
    for _ in range(steps):
        next_batch(samples)
    return steps * BATCH * SEQUENCE / (time.perf_counter() - start)


def endless(dataset: StreamingDataset):
    while True:
        yield from dataset


def next_batch(samples) -> np.ndarray:
    batch = np.empty((BATCH, SEQUENCE), np.int64)
    for row in range(BATCH):
        batch[row] = next(samples)["tokens"]
    return batch


if __name__ == "__main__":
    folder, verb, *arguments = sys.argv[1:]
    if verb == "write":
        write(folder, *arguments)
    else:
        print(read(folder, int(*arguments)))
