"""Every flag, typed: one frozen dataclass per group of options."""

from library.options.attention import AttentionOptions
from library.options.base import Option, Settings, option, options_of
from library.options.cache import CacheOptions
from library.options.config import ConfigOptions
from library.options.console import ConsoleOptions
from library.options.dataset import DatasetOptions
from library.options.distributed import DistributedOptions
from library.options.dreambooth import DreamBoothOptions
from library.options.ema import EmaOptions
from library.options.finetune import FineTuneOptions
from library.options.full_model import FullModelOptions
from library.options.huggingface import HubOptions
from library.options.loader import LoaderOptions
from library.options.logging import LogOptions
from library.options.memory import MemoryOptions
from library.options.metadata import MetadataOptions
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.objective import ObjectiveOptions
from library.options.optimizer import OptimizerOptions
from library.options.precision import PrecisionOptions
from library.options.preview import PreviewOptions
from library.options.rehearsal import RehearsalOptions
from library.options.resume import ResumeOptions
from library.options.saving import SaveOptions
from library.options.scheduler import SchedulerOptions
from library.options.sdxl import SdxlOptions
from library.options.sdxl_finetune import SdxlFineTuneOptions
from library.options.textual_inversion import TextualInversionOptions
from library.options.training import TrainingOptions
from library.options.validation import ValidationOptions

# Of which every training script takes one.
METHODS = (NetworkOptions, DreamBoothOptions, FineTuneOptions, SdxlFineTuneOptions, TextualInversionOptions)
# What every training script takes, in the order of its --help.
TRAINING = (
    ModelOptions,
    DatasetOptions,
    CacheOptions,
    LoaderOptions,
    TrainingOptions,
    ObjectiveOptions,
    RehearsalOptions,
    OptimizerOptions,
    SchedulerOptions,
    EmaOptions,
    PrecisionOptions,
    MemoryOptions,
    AttentionOptions,
    DistributedOptions,
    SaveOptions,
    ResumeOptions,
    HubOptions,
    MetadataOptions,
    PreviewOptions,
    ValidationOptions,
    LogOptions,
    ConsoleOptions,
    ConfigOptions,
)

__all__ = [
    "METHODS",
    "TRAINING",
    "AttentionOptions",
    "CacheOptions",
    "ConfigOptions",
    "ConsoleOptions",
    "DatasetOptions",
    "DistributedOptions",
    "DreamBoothOptions",
    "EmaOptions",
    "FineTuneOptions",
    "FullModelOptions",
    "HubOptions",
    "LoaderOptions",
    "LogOptions",
    "MemoryOptions",
    "MetadataOptions",
    "ModelOptions",
    "NetworkOptions",
    "ObjectiveOptions",
    "OptimizerOptions",
    "Option",
    "PrecisionOptions",
    "PreviewOptions",
    "RehearsalOptions",
    "ResumeOptions",
    "SaveOptions",
    "SchedulerOptions",
    "SdxlFineTuneOptions",
    "SdxlOptions",
    "Settings",
    "TextualInversionOptions",
    "TrainingOptions",
    "ValidationOptions",
    "option",
    "options_of",
]
