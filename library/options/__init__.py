"""Every flag, typed: one frozen dataclass per group of options."""

from library.options.base import Option, Settings, option, options_of
from library.options.cache import CacheOptions
from library.options.config import ConfigOptions
from library.options.dataset import DatasetOptions
from library.options.loader import LoaderOptions
from library.options.logging import LogOptions
from library.options.metadata import MetadataOptions
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.precision import PrecisionOptions
from library.options.preview import PreviewOptions
from library.options.saving import SaveOptions
from library.options.sdxl import SdxlOptions
from library.options.training import TrainingOptions

# What every training script takes, in the order of its --help.
TRAINING = (
    ModelOptions,
    DatasetOptions,
    CacheOptions,
    LoaderOptions,
    TrainingOptions,
    OptimizerOptions,
    PrecisionOptions,
    SaveOptions,
    MetadataOptions,
    PreviewOptions,
    LogOptions,
    ConfigOptions,
)

__all__ = [
    "TRAINING",
    "CacheOptions",
    "ConfigOptions",
    "DatasetOptions",
    "LoaderOptions",
    "LogOptions",
    "MetadataOptions",
    "ModelOptions",
    "NetworkOptions",
    "OptimizerOptions",
    "Option",
    "PrecisionOptions",
    "PreviewOptions",
    "SaveOptions",
    "SdxlOptions",
    "Settings",
    "TrainingOptions",
    "option",
    "options_of",
]
