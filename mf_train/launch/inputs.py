"""What the configuration reads, looked at where the job is submitted: a wrong path costs no time in the queue."""

from functools import cache

from mf_train.config import Config
from mf_train.errors import UserError


def check_inputs(config: Config, later: bool) -> list[str]:
    """Raises UserError for a tokenizer or local data that are not there, or a run folder of another model.

    With `later` the job waits for another one, which may make what is missing: then these are warnings, returned.
    URLs and datasets of the hub are left to the job.
    """
    from mf_train.training.folder import check_folder

    found = []
    for check in (
        lambda: _check_tokenizer(config),
        lambda: _check_data(config),
        lambda: check_folder(config),
    ):
        try:
            check()
        except UserError as error:
            if not later:
                raise
            found.append(f"not there yet, so the job before must make it: {error}")
    return found


def _check_tokenizer(config: Config) -> None:
    if config.tokenizer.path:
        _find_tokenizer(config.tokenizer.path)


def _check_data(config: Config) -> None:
    for name in ("train", "validation"):
        for index, source in enumerate(getattr(config.data, name)):
            if source.path and "://" not in source.path:
                _find_data(source.path, f"data.{name}[{index}].path")


@cache  # the tasks of an array mostly read the same
def _find_tokenizer(path: str) -> None:
    from mf_train.data.tokenizer import find_model

    find_model(path)


@cache
def _find_data(path: str, key: str) -> None:
    from mf_train.data.files.input_files import find_files

    find_files(path, key)
