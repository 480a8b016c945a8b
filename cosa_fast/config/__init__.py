"""Every setting of the pipeline: one immutable section per concern, validated before any work starts.

The defaults are the paper's VOC settings (Sec. 4.1; where the paper is silent, the authors' release, see README
"Fidelity"). `config/*.yaml` hold what differs from them, and `Config.model_json_schema()` is the schema.
"""

from cosa_fast.config.data import AugmentConfig, CocoConfig, DataConfig, LoaderConfig, MiniVocConfig, VocConfig
from cosa_fast.config.results import EvalConfig, MultistageConfig, PseudoConfig, RuntimeConfig, StudiesConfig
from cosa_fast.config.section import Positive, Section
from cosa_fast.config.training import CosaConfig, ModelConfig, OptimConfig, TrainConfig, ValidationConfig
from cosa_fast.config.whole import (
    RHYTHM,
    Config,
    before_guidance,
    config_from_mapping,
    describe_validation_error,
    load_config,
    to_flags,
)

__all__ = [
    "RHYTHM",
    "AugmentConfig",
    "CocoConfig",
    "Config",
    "CosaConfig",
    "DataConfig",
    "EvalConfig",
    "LoaderConfig",
    "MiniVocConfig",
    "ModelConfig",
    "MultistageConfig",
    "OptimConfig",
    "Positive",
    "PseudoConfig",
    "RuntimeConfig",
    "Section",
    "StudiesConfig",
    "TrainConfig",
    "ValidationConfig",
    "VocConfig",
    "before_guidance",
    "config_from_mapping",
    "describe_validation_error",
    "load_config",
    "to_flags",
]
