"""`verify` and `list` on good checkpoints and on ones with every kind of damage."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from mf_train.checkpoint import verify as module
from mf_train.checkpoint.layout import (
    CONFIG,
    KINDS,
    MANIFEST,
    PROBE,
    STATE,
    Manifest,
    part_name,
    read_manifest,
)
from mf_train.checkpoint.verify import find_damage, list_lines, verify
from mf_train.config import ModelConfig
from mf_train.errors import TrainingError, UserError
from tests.standalone.checkpoints import (
    flip,
    random_weights,
    records,
    write_checkpoint,
    write_slices,
    write_tensors,
)

SMALL = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, bits=4, vocab_size=4096, sequence_length=32)
STEP = 7
WEIGHTS = part_name("master", 1, 2, 0)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks with moments and several parts."""
    folder = tmp_path_factory.mktemp("verify") / "step-000000007"
    weights = random_weights(SMALL, seed=1)
    write_checkpoint(folder, SMALL, weights, tensor=2)
    for path in folder.glob("weights-*"):
        path.unlink()
    values = {kind: {name: torch.randn(w.shape) for name, w in weights.items()} for kind in KINDS}
    write_slices(folder, values | {"master": weights}, 2, STEP, part_bytes=100_000)
    assert len(list(folder.glob("exp_avg_sq-1-of-2-*"))) > 2
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run" / "checkpoints" / original.name))


def test_a_good_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = checkpoint.parents[1]
    files = len(list(checkpoint.iterdir())) - 1
    for task in (1000, 256 << 20):  # bytes that one thread reads of a file
        monkeypatch.setattr(module, "_TASK_BYTES", task)
        for path in (checkpoint, run, run / "checkpoints"):
            (line,) = verify(path)
            assert line.startswith(f"{checkpoint}: good: step 7, tensor-parallel 2, {files} files, ")


@pytest.mark.parametrize(
    "kind", ["weights-0", "weights-1", "exp_avg-1", "exp_avg_sq-0", STATE, CONFIG, PROBE, "token"]
)
def test_a_flipped_bit_anywhere(checkpoint: Path, kind: str) -> None:
    for victim in sorted(checkpoint.glob(f"{kind}*")):
        for place in (0, victim.stat().st_size // 2, -1):
            flip(victim, place)
            problems = list(find_damage(checkpoint))
            assert len(problems) == 1 and problems[0].startswith(f"{victim}: its checksum is "), problems
            flip(victim, place)
    assert not list(find_damage(checkpoint))


def test_a_flipped_bit_of_the_manifest(checkpoint: Path) -> None:
    data = bytearray((checkpoint / MANIFEST).read_bytes())
    data[data.index(b'"crc32"') + 11] ^= 1  # a digit of a file's checksum
    (checkpoint / MANIFEST).write_bytes(data)
    assert list(find_damage(checkpoint)) == [f"{checkpoint / MANIFEST}: damaged"]


def put_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path) -> None:
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / "elsewhere")


# what is done to a file of the checkpoint, and what is said of it
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut": (WEIGHTS, lambda path: os.truncate(path, 5), rf"{WEIGHTS}: 5 bytes instead of \d+"),
    "lengthened": (
        WEIGHTS,
        lambda path: os.truncate(path, 10**6),
        rf"{WEIGHTS}: 1000000 bytes instead of \d+",
    ),
    "removed": (WEIGHTS, Path.unlink, f"{WEIGHTS}: missing"),
    "a link": (WEIGHTS, link, f"{WEIGHTS}: missing, or not a file"),
    "a folder": (WEIGHTS, put_a_folder, f"{WEIGHTS}: missing, or not a file"),
    "one more": ("notes.txt", Path.touch, r"notes\.txt: not in manifest\.json"),
    "no manifest": (MANIFEST, Path.unlink, r"manifest\.json: missing"),
    "garbled manifest": (MANIFEST, lambda path: path.write_bytes(b"\xff{"), r"manifest\.json: damaged"),
    "renamed": (
        MANIFEST,
        lambda path: path.parent.rename(path.parent.with_name("step-000000008")),
        r"step-000000008/manifest\.json: of step 7",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(checkpoint: Path, case: str) -> None:
    file, damage, expected = DAMAGE[case]
    damage(checkpoint / file)
    with pytest.raises(TrainingError, match=f"^1 of 1 checkpoints are damaged: .*{expected}[^;]*$"):
        list(verify(checkpoint.parent))


def write_embedding(path: Path, tensor: torch.Tensor, **more: torch.Tensor) -> None:
    write_tensors(path, {"embedding.weight": tensor, **more})


ROWS = torch.zeros(4096, 8)
MISMATCHES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "another step": (
        STATE,
        lambda path: path.write_text('{"step": 8}'),
        rf"{STATE}: of step 8, and manifest\.json of step 7",
    ),
    "garbled state": (STATE, lambda path: path.write_text("[7"), rf"{STATE}: damaged \(not a JSON object\)"),
    "garbled config": (
        CONFIG,
        lambda path: path.write_text("model: {bits: many}"),
        rf"{CONFIG}: model\.bits is 'many'",
    ),
    "no config": (CONFIG, Path.unlink, rf"{CONFIG}: missing from the checkpoint and from manifest\.json"),
    "no part": (WEIGHTS, Path.unlink, rf"{WEIGHTS}: missing from the checkpoint and from manifest\.json"),
    "a pickle": (
        PROBE,
        lambda path: torch.save({"tokens": torch.zeros(3)}, path),
        f"{PROBE}: damaged, or not a safetensors file",
    ),
    "another dtype": (
        WEIGHTS,
        lambda path: write_embedding(path, ROWS.bfloat16()),
        rf"{WEIGHTS}: embedding\.weight is \(torch\.bfloat16, \(4096, 8\)\) in it and \(torch\.float32",
    ),
    "another shape": (
        WEIGHTS,
        lambda path: write_embedding(path, ROWS.T.contiguous()),
        rf"{WEIGHTS}: embedding\.weight is \(torch\.float32, \(8, 4096\)\) in it",
    ),
    "another name": (
        WEIGHTS,
        lambda path: write_embedding(path, ROWS, extra=torch.zeros(1)),
        rf"{WEIGHTS}: extra is \(torch\.float32, \(1,\)\) in it and None by manifest",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_contents_that_do_not_fit_though_every_checksum_is_right(checkpoint: Path, case: str) -> None:
    file, damage, expected = MISMATCHES[case]
    damage(checkpoint / file)
    manifest = dataclasses.replace(read_manifest(checkpoint, check_sizes=False), files=records(checkpoint))
    (checkpoint / MANIFEST).write_text(manifest.to_json())
    with pytest.raises(TrainingError, match=f"^1 of 1 checkpoints are damaged: .*{expected}"):
        list(verify(checkpoint))


@pytest.mark.parametrize(
    "change",
    [
        {"tensor_parallel": 0},
        {"tensor_parallel": 3},
        {"tensor_parallel": "2"},
        {"kinds": ("exp_avg",)},
        {"parts": {}},
        {"parts": []},
        {"parameters": {"norm.weight": (16, "x")}},
        {"step": None},
    ],
    ids=str,
)
def test_a_manifest_made_to_harm_is_damaged_too(checkpoint: Path, change: dict[str, object]) -> None:
    manifest = dataclasses.replace(read_manifest(checkpoint), **change)  # type: ignore[arg-type]
    (checkpoint / MANIFEST).write_text(manifest.to_json())
    assert list(find_damage(checkpoint)) == [f"{checkpoint / MANIFEST}: damaged"]


def test_all_of_a_run_are_read_and_every_damage_is_told(checkpoint: Path) -> None:
    run = checkpoint.parents[1]
    others = [checkpoint.with_name(f"step-{step:09d}") for step in (8, 9)]
    for step, other in zip((8, 9), others, strict=True):
        shutil.copytree(checkpoint, other)
        (other / STATE).write_text(json.dumps({"step": step}))
        manifest = dataclasses.replace(
            read_manifest(other, check_sizes=False), step=step, files=records(other)
        )
        (other / MANIFEST).write_text(manifest.to_json())
    assert len(list(verify(run))) == 3
    (checkpoint / WEIGHTS).unlink()
    (others[0] / STATE).write_text("")
    (others[0] / "extra").touch()
    lines = []
    with pytest.raises(TrainingError, match="2 of 3") as caught:
        for line in verify(run):
            lines.append(line)
    assert [line.partition(": good")[0] for line in lines] == [str(others[1])]
    for path in (checkpoint / WEIGHTS, others[0] / STATE, others[0] / "extra"):
        assert f"{path}: " in str(caught.value)


def test_what_a_run_deletes_meanwhile_is_no_damage(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = checkpoint.parents[1]
    second, third, fourth = (checkpoint.with_name(f"step-{step:09d}") for step in (8, 9, 10))
    for other in (second, third, fourth):
        shutil.copytree(checkpoint, other)
    (fourth / WEIGHTS).unlink()
    checksums, deleted = module._checksums, [third]

    def delete_after_its_files(folder: Path, sizes: Mapping[str, int]) -> dict[str, int | str]:
        found = checksums(folder, sizes)
        if folder in deleted:
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(module, "_checksums", delete_after_its_files)
    lines = verify(run)
    assert next(lines).startswith(f"{checkpoint}: good: ")
    shutil.rmtree(second)
    assert [next(lines), next(lines)] == [f"{other}: deleted meanwhile" for other in (second, third)]
    with pytest.raises(TrainingError, match=f"^1 of 2 checkpoints are damaged: {fourth / WEIGHTS}: missing"):
        next(lines)
    deleted += [checkpoint, fourth]
    with pytest.raises(TrainingError, match=f"^1 of 1 checkpoints are damaged: .*{fourth}: cannot be read"):
        list(verify(fourth))
    with pytest.raises(UserError, match=f"^{run}: all checkpoints were deleted meanwhile"):
        list(verify(run))


def test_list_leaves_out_what_is_deleted_meanwhile(checkpoint: Path) -> None:
    other = shutil.copytree(checkpoint, checkpoint.with_name("step-000000008"))
    lines = list_lines(checkpoint.parents[1])
    next(lines)
    shutil.rmtree(other)
    assert list(lines) == []


def test_list(checkpoint: Path) -> None:
    run = checkpoint.parents[1]
    other = shutil.copytree(checkpoint, checkpoint.with_name("step-000000020"))
    (run / "checkpoints" / "latest").write_text(f"{checkpoint.name}\n")
    manifest = dataclasses.replace(read_manifest(other), step=20)
    (other / MANIFEST).write_text(manifest.to_json())
    os.utime(checkpoint / MANIFEST, (1_700_000_000, 1_700_000_000))
    first, second = list_lines(run)
    assert first.startswith("step-000000007  ") and " 2023-11-1" in first and first.endswith("  latest")
    assert "step 20, tensor-parallel 2" in second and "latest" not in second
    (other / STATE).unlink()
    assert list(list_lines(run))[1] == f"step-000000020  {other / STATE}: missing from the checkpoint"


def test_masters_alone_are_said(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "published", SMALL, random_weights(SMALL, seed=2), tensor=1)
    (line,) = verify(folder)
    assert "step 7, tensor-parallel 1, without moments" in line
    assert isinstance(read_manifest(folder), Manifest)


def test_where_there_is_none(tmp_path: Path) -> None:
    for function in (verify, list_lines):
        with pytest.raises(UserError, match="no such checkpoint"):
            list(function(tmp_path / "nowhere"))
        with pytest.raises(UserError, match="holds no complete checkpoint"):
            list(function(tmp_path))
