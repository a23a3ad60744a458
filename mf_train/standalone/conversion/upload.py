"""`memoryformer convert --upload OWNER/NAME`: a converted model's folder as a repository of the Hugging Face hub.

What is sent is what the certificate says was proved, in one commit: a repository never has half a model. Weights go by
the hub's storage of large files, which keeps what an upload that was cut off has sent.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mf_train.errors import TrainingError, UserError
from mf_train.standalone.conversion.certificate import hash_files, read_certificate
from mf_train.standalone.conversion.check import hash_tensors, stray_files
from mf_train.standalone.folder import CARD, INDEX, REMEDY
from mf_train.text import first_line, human_bytes

# Files that a model's owner may write anew; the others are what was proved.
_OWN = (CARD, "chat_template.jinja", "generation_config.json", "tokenizer_config.json")
# Endings of files that are deleted from the repository where they are not sent.
_WEIGHTS = (".safetensors", INDEX)
_SHOWN = 5


def check_upload(repository: str, dry_run: bool) -> None:
    """Whether an upload can begin, before there is anything to send: the name, the token and, by asking the hub who its
    user is, the network. A dry run asks nobody.

    Raises UserError for a name or a token that cannot be right, TrainingError where the hub does not answer.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if repository.count("/") != 1:
            raise HFValidationError("it has one '/', between owner and name")
        validate_repo_id(repository)
    except HFValidationError as error:
        reason = first_line(error).rstrip(".")
        raise UserError(f"--upload {repository}: is no OWNER/NAME of a repository: {reason}") from None
    if dry_run:
        return
    if get_token() is None:
        raise UserError(
            f"--upload {repository}: no token of the hub: run 'hf auth login', or set HF_TOKEN to one that may write"
        )
    with _errors(f"--upload {repository}"):
        HfApi().whoami()


def upload(folder: Path, repository: str, *, private: bool = False, dry_run: bool = False) -> Iterator[str]:
    """Send a converted model's folder, after `check_upload`; yields lines to show.

    A repository that is not there yet is made, for its owner and those that it lets in if `private`. Files of weights
    that were there and are not of this model are deleted. `dry_run` says what would be sent.

    Raises UserError for a folder that is not complete or not what its certificate says, TrainingError where the hub
    refuses or does not answer.
    """
    files, changed = _files_to_send(folder)
    sizes = {path.name: path.stat().st_size for path in files}
    if changed:
        yield f"{folder}: sent as they are now, and not as converted: {', '.join(changed)}"
    total = f"{len(files)} files, {human_bytes(sum(sizes.values()))} in all"
    if dry_run:
        yield f"would send to {_address(repository)}" + (" (private):" if private else ":")
        for name, size in sizes.items():
            yield f"  {human_bytes(size):>10}  {name}"
        yield f"{total}; dry run: nothing was sent"
        return
    with _errors(f"{folder}: not sent to {repository}"):
        address = _send(files, repository, private)
    yield f"sent {total}, to {address}"


def _files_to_send(folder: Path) -> tuple[list[Path], list[str]]:
    """All files of the folder, and the names of those that are not as the certificate has them. Raises UserError."""
    certificate = read_certificate(folder)
    problems = list(stray_files(folder))
    tensors, files = hash_tensors(folder), dict(hash_files(folder))
    changed = []
    for name in sorted({*certificate["files"], *files}):
        if name not in files:
            problems.append(f"{name} is missing")
        elif files[name] != certificate["files"].get(name):
            if name in certificate["files"] and name not in _OWN:
                problems.append(f"{name} is not what was converted")
            changed.append(name)
    for name in sorted({*certificate["tensors"], *tensors}):
        if tensors.get(name) != certificate["tensors"].get(name):
            problems.append(f"tensor {name} is {'not what was converted' if name in tensors else 'missing'}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(f"{folder}: nothing was sent: {'; '.join(problems[:_SHOWN])}{more}; {REMEDY}")
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")], changed


def _address(repository: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


def _send(files: Sequence[Path], repository: str, private: bool) -> str:
    """Make the repository where there is none, and commit; returns its address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    hub = HfApi()
    hub.create_repo(repository, private=private or None, exist_ok=True)
    info = hub.model_info(repository)
    if private and not info.private:
        raise UserError(
            f"--private: {_address(repository)} is there already and public: make it private there, leave "
            "--private out, or give another name"
        )
    names = {path.name for path in files}
    stale = [
        each.rfilename
        for each in info.siblings or ()
        if each.rfilename.endswith(_WEIGHTS) and each.rfilename not in names and "/" not in each.rfilename
    ]
    operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in stale]
    operations += [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
    # the commit before it: an upload of somebody else in between is an error, and not a mixture
    hub.create_commit(
        repository, operations, commit_message="Upload a converted MemoryFormer", parent_commit=info.sha
    )
    return _address(repository) + (" (private)" if info.private else "")


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """One line for each way in which the hub fails; `what` begins it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    hub = constants.ENDPOINT
    try:
        yield
    except (UserError, TrainingError):
        raise
    except HfHubHTTPError as error:
        status, said = error.response.status_code, error.server_message or first_line(error)
        if status == 401:
            raise UserError(
                f"{what}: {hub} does not know the token: run 'hf auth login' again, or set HF_TOKEN"
            ) from None
        if status == 403:
            raise UserError(
                f"{what}: {hub} does not allow it: give a token that may write for this owner ({said})"
            ) from None
        raise TrainingError(f"{what}: {hub} answers {status} ({said}); try again later") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{what}: HF_HUB_OFFLINE is set: unset it, or use --dry-run") from None
    except ValueError as error:  # the card's metadata, or the storage's answer
        raise TrainingError(f"{what}: {hub} refuses it ({'; '.join(str(error).split(chr(10)))})") from None
    except Exception as error:  # of HTTP clients and storage, which are others in other versions
        if isinstance(error, OSError) and error.filename is not None:
            raise  # a file that cannot be read
        raise TrainingError(
            f"{what}: {hub} does not answer ({first_line(error)}); look at the network, or at HF_ENDPOINT"
        ) from error
