"""The configuration of a run: typed sections. `mf_train.config.loading` reads them from YAML. Imports no torch."""

from mf_train.config.model import ModelConfig
from mf_train.config.sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    GroupConfig,
    GroupsConfig,
    KernelsConfig,
    LoggingConfig,
    OnError,
    OptimizerConfig,
    ParallelConfig,
    PhaseConfig,
    ProfileConfig,
    ScheduleConfig,
    SourceConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "GroupConfig",
    "GroupsConfig",
    "KernelsConfig",
    "LoggingConfig",
    "ModelConfig",
    "OnError",
    "OptimizerConfig",
    "ParallelConfig",
    "PhaseConfig",
    "ProfileConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "ValidationConfig",
]
