"""Choosing the checkpoint to resume from: the newest good one, after older starts were shut out of the folder.

Rank 0 looks and decides; all ranks share the reading of checksums.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from mf_train.checkpoint.checksum import crc_of_file, read_crcs
from mf_train.checkpoint.fence import Fence, claim, set_aside
from mf_train.checkpoint.layout import (
    CONFIG,
    LATEST,
    STATE,
    DamageError,
    list_checkpoints,
    read_manifest,
    resolve_checkpoint,
    step_of,
)
from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import Config
from mf_train.config.loading import load_config
from mf_train.errors import UserError
from mf_train.files import write_whole
from mf_train.parallel.agreement import exclusive_or, run_long_on_all, run_on_all, run_on_first
from mf_train.run_folder import CHECKPOINTS

DAMAGED, ABANDONED = "damaged", "abandoned"


def look_ahead(config: Config, fits: Callable[[CheckpointReader], object]) -> int:
    """Refuse a start that could not resume, before it shuts out an older one that may still be running.

    Returns the step to resume from, as far as can be seen. `fits` raises UserError for a checkpoint that this
    configuration cannot resume from. For rank 0; changes no file.
    """
    path = next(_in_order(config, Path(config.training.output_dir) / CHECKPOINTS), None)
    if path is None:
        return 0
    try:
        reader = CheckpointReader(path)
        for name in (STATE, CONFIG):
            if name in reader.manifest.files:
                reader.read_file(name)
        reader.read_tokenizer()
    except UserError:
        return 0  # `choose_checkpoint` deals with a damaged one
    fits(reader)
    return reader.manifest.step


def choose_checkpoint(
    config: Config, device: torch.device, stop: Callable[[], bool], still_alive: Callable[[], None]
) -> tuple[Fence, CheckpointReader | None] | None:
    """Claim the run's `checkpoints/` and find what to resume from; None where `stop()` was set on any rank.

    A damaged checkpoint of the run is named, renamed and passed over; one that was given as `checkpoint.resume` is an
    error. Collective over all ranks; raises on rank 0 UserError or OSError, on the others PeerError.
    """
    folder = Path(config.training.output_dir) / CHECKPOINTS
    fence = Fence(folder, run_on_first(lambda: claim(folder).token, device))
    candidates = _Candidates(config, fence)
    while (path := run_on_first(candidates.propose, device)) is not None:
        damage = ""
        if config.checkpoint.verify:
            found = _find_damage(path, device, stop, still_alive)
            if found is None:
                return None
            damage = found
        run_on_first(partial(candidates.judge, path, damage), device)
        if not damage:
            return fence, run_on_all(partial(CheckpointReader, path, check_sizes=False), device)
    return fence, None


def _find_damage(
    checkpoint: Path, device: torch.device, stop: Callable[[], bool], still_alive: Callable[[], None]
) -> str | None:
    """The first file whose checksum is wrong, "" if none is; None where `stop()` was set. Collective."""
    manifest = run_on_all(lambda: read_manifest(checkpoint, check_sizes=False), device)
    sizes = {name: record.size for name, record in manifest.files.items()}
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shares = run_long_on_all(
        lambda: read_crcs(checkpoint, sizes, rank, ranks, still_alive), device, stop, _ignore
    )
    if shares is None:
        return None
    for (name, record), total in zip(manifest.files.items(), exclusive_or(shares, device), strict=True):
        if crc_of_file(total, record.size) != record.crc32:
            return f"{name}: its checksum is not the manifest's"
    return ""


def _ignore() -> None:
    return None


class _Candidates:
    """Rank 0's choice among the checkpoints to resume from."""

    def __init__(self, config: Config, fence: Fence) -> None:
        self.folder = fence.folder
        self._fence = fence
        self._resume = config.checkpoint.resume
        self._order = _in_order(config, fence.folder)

    def propose(self) -> Path | None:
        """The best that is left whose files are there with their sizes; None for a new run. Raises UserError."""
        for path in self._order:
            try:
                read_manifest(path)
            except DamageError as error:
                self.judge(path, f"{error.file.name}: {error.damage}")
            else:
                return path
        aside = [
            path.name for why in (DAMAGED, ABANDONED) for path in sorted(self.folder.glob(f"step-*.{why}*"))
        ]
        if aside:
            raise UserError(
                f"{self.folder}: no checkpoint of this run is good ({', '.join(aside)}); start from another one "
                "with checkpoint.resume=PATH, or delete them to begin anew"
            )
        return None

    def judge(self, path: Path, damage: str) -> None:
        """Take a checkpoint, or pass it over for what is wrong with it.

        A damaged one of this run is renamed, and so are those that are newer than one that is taken: their steps will
        be trained again. Raises UserError for a damaged one that was asked for.
        """
        own = list_checkpoints(self.folder)
        if damage and not (path in own and _resumes_own(self._resume, own)):
            raise UserError(f"{path}: {damage}; choose another checkpoint.resume")
        self._fence.check()  # a newer start's checkpoints are not this one's to rename
        if damage:
            aside = set_aside(path, DAMAGED)
            print(f"{path.name} is damaged and was renamed to {aside.name}: {damage}", flush=True)
            return
        step = read_manifest(path, check_sizes=False).step
        left = []
        for mine in own:
            if mine == path or step_of(mine) < step:
                left.append(mine)
                continue
            aside = set_aside(mine, ABANDONED)
            print(f"going back to {path}: {mine.name} was renamed to {aside.name}", flush=True)
        if left:
            write_whole(self.folder / LATEST, f"{left[-1].name}\n".encode(), self._fence.token)
        else:
            (self.folder / LATEST).unlink(missing_ok=True)


def _in_order(config: Config, folder: Path) -> Iterator[Path]:
    """Checkpoints to resume from, best first. Raises UserError where `checkpoint.resume` does not fit the folder."""
    own, resume = list_checkpoints(folder), config.checkpoint.resume
    if _resumes_own(resume, own):
        yield from reversed(own)
        return
    path = resolve_checkpoint(Path(resume))
    if own and path.parent.resolve() != folder.resolve():
        raise UserError(
            f"{folder}: holds checkpoints up to {own[-1].name} of a run that did not start from {resume}; leave "
            "checkpoint.resume out to go on with it, or choose another training.output_dir"
        )
    yield next((mine for mine in own if mine.resolve() == path.resolve()), path)


def _resumes_own(resume: str, own: list[Path]) -> bool:
    """Whether the run resumes from its own newest checkpoint: also where it is started again with the command that
    made it start from another, as a launcher does.
    """
    return resume in ("auto", "never") or any(_started_from(path) == resume for path in own)


def _started_from(checkpoint: Path) -> str | None:
    """`checkpoint.resume` of the run that wrote a checkpoint; None where that cannot be read."""
    try:
        return load_config(checkpoint / CONFIG).checkpoint.resume
    except UserError:
        return None
