"""A run's numbers for Weights & Biases (`logging.wandb`); the only place that imports it.

Each start of a run is a run there, in one group, so that steps which are trained again after going back have a curve of
their own.
"""

import netrc
import os
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from mf_train.config import Config
from mf_train.config.loading import config_to_tree
from mf_train.errors import UserError

_HOST = "https://api.wandb.ai"
_FINISH_SECONDS = 60.0  # for what is still to be sent at the end, the rest stays in the run's folder


def check_wandb(config: Config) -> None:
    """Raises UserError where the package or, to be online, the key is missing."""
    if find_spec("wandb") is None:
        raise UserError(
            "logging.wandb.project is set and the package wandb is not installed: pip install wandb, or leave it out"
        )
    if config.logging.wandb.mode == "online" and not _has_key():
        raise UserError(
            "logging.wandb.project is set and there is no key of Weights & Biases: set WANDB_API_KEY, run 'wandb "
            "login', or set logging.wandb.mode=offline"
        )


def _has_key() -> bool:
    """In the places that `wandb login` documents."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _HOST)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbRun:
    """What one start of a run sends, after `step`. Raises UserError where Weights & Biases refuses it."""

    def __init__(self, config: Config, step: int) -> None:
        import wandb

        folder, settings = Path(config.training.output_dir), config.logging.wandb
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                group=folder.name,
                name=f"{folder.name} after step {step}" if step else folder.name,
                dir=str(folder),
                mode=settings.mode,
                config=config_to_tree(config),
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_git=True,
                    save_code=False,
                    finish_timeout=_FINISH_SECONDS,
                ),
            )
        except wandb.Error as error:
            raise UserError(f"logging.wandb: {' '.join(str(error).split())}") from None

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
