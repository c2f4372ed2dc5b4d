"""What the training scripts do, whichever models they are for. Imports no torch before the flags are checked."""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from library import cli, console, options
from library.data.config import BOTH_KINDS

if TYPE_CHECKING:
    from library.training.methods.base import Method


def train_network(description: str, *, sdxl: bool, counterpart: str) -> None:
    """Train what --network_module names, on SDXL models or on all others; `counterpart` is the script for those."""

    def method(settings: options.Settings) -> "Method":
        from library.training.methods.network import NetworkMethod

        return NetworkMethod(settings[options.NetworkOptions], settings[options.OptimizerOptions], settings.flat())

    _train(description, options.NetworkOptions, method, sdxl=sdxl, counterpart=counterpart)


def train_model(
    description: str, own: type[options.FullModelOptions], *, sdxl: bool, counterpart: str, kinds: frozenset[str]
) -> None:
    """Train the parts of the model that `own` options name, on subsets of these kinds."""

    def method(settings: options.Settings) -> "Method":
        from library.training.methods.finetune import FineTune

        return FineTune(settings[own], settings[options.OptimizerOptions])

    _train(description, own, method, sdxl=sdxl, counterpart=counterpart, kinds=kinds)


def textual_inversion(description: str, *, sdxl: bool, counterpart: str) -> None:
    """Learn the vectors of new words of SDXL models' or of all others'; `counterpart` is the script for those."""

    def method(settings: options.Settings) -> "Method":
        from library.training.methods.textual_inversion import TextualInversion
        from library.training.text_caching import text_options

        reading = text_options(settings)
        return TextualInversion(settings[options.TextualInversionOptions], settings[options.OptimizerOptions], reading)

    _train(description, options.TextualInversionOptions, method, sdxl=sdxl, counterpart=counterpart)


def _train(
    description: str,
    own: type,
    make_method: Callable[[options.Settings], "Method"],
    *,
    sdxl: bool,
    counterpart: str,
    kinds: frozenset[str] = BOTH_KINDS,
) -> None:
    """From the command line to the end of a run. `own` is the options group of the method, `kinds` are the subsets that
    the script takes.
    """
    console.setup(None)
    groups = (own, *options.TRAINING, *((options.SdxlOptions,) if sdxl else ()))
    settings = cli.parse(groups, description=description)
    console.configure(settings[options.ConsoleOptions])
    if settings[options.TrainingOptions].deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS starts
    from library.training import preflight

    plans = preflight.check(settings, trains_text_encoder=settings[own].trains_text_encoder, kinds=kinds)
    with console.quiet_dependencies():
        from library.training.base_model import Script
        from library.training.launch import launch
    if status := launch(settings, plans, make_method(settings), Script(sdxl, counterpart)):
        sys.exit(status)
