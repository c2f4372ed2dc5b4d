"""What of a network the optimizer is to move."""

from typing import Any

from library.console import warn
from library.errors import UserError, some
from library.training.methods.base import ParameterGroup
from library.training.methods.network_module import failing_as_mistake, failure

_READ = {"params", "lr"}


def read_groups(answer: Any, name: str | None, hook: str, default: float) -> list[ParameterGroup]:
    """What `hook` of a network of the module `name` has answered: groups, or these and their names, of which there may
    be none or too few. A group without a rate has the `default`. UserError for an answer of another kind, and if
    nothing is left to train.
    """
    with failing_as_mistake(failure(name, hook)):
        groups, names = answer if isinstance(answer, tuple) else (answer, None)
        groups, names = list(groups), list(names or ())
        if len(names) != len(groups):
            names = [f"group{number}" for number in range(len(groups))] if len(groups) > 1 else ["network"]
        read = [
            ParameterGroup(str(own), list(group["params"]), default if group.get("lr") is None else float(group["lr"]))
            for own, group in zip(names, groups, strict=True)
        ]
        others = sorted(set().union(*groups) - _READ)
    if not read:
        raise UserError("nothing is left to train: every learning rate of the network is 0")
    if others:
        warn(
            f"--network_module: {hook} of {name} gives {some(others)} with its parameters, which has no effect: use "
            "--optimizer_args, which count for all of them"
        )
    return read
