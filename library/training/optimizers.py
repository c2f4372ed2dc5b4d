"""Optimizers by name."""

import ast
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from library.errors import UserError, suggest
from library.options.optimizer import OptimizerOptions
from library.training.methods.base import ParameterGroup

CLASSES: dict[str, type[torch.optim.Optimizer]] = {"AdamW": torch.optim.AdamW}


def make_optimizer(options: OptimizerOptions, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    """The optimizer of --optimizer_type over the groups, in their order, each with its own learning rate."""
    kind = CLASSES[options.optimizer]
    keywords = literal_keywords(kind, options.optimizer_keywords)
    try:
        return kind([{"params": group.parameters, "lr": group.learning_rate} for group in groups], **keywords)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer_args: {kind.__name__} refuses them: {error}") from error


def check_optimizer(options: OptimizerOptions) -> None:
    """UserError for arguments that the optimizer does not take, before anything is loaded for it."""
    make_optimizer(options, [ParameterGroup("", [nn.Parameter(torch.zeros(1))], options.learning_rate)])


def literal_keywords(kind: type, keywords: Mapping[str, str]) -> dict[str, Any]:
    """--optimizer_args read as Python literals; text that is none stays text. UserError for a name it does not take."""
    known = [name for name in inspect.signature(kind).parameters if name not in ("self", "params", "lr")]
    values = {}
    for name, text in keywords.items():
        if name not in known:
            raise UserError(
                f"--optimizer_args: {kind.__name__} takes no {name}{suggest(name, known)} (it takes {', '.join(known)})"
            )
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values
