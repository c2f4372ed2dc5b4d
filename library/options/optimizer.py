"""What moves the weights, and how fast."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from library.errors import UserError, suggest
from library.options.base import option, parse_key_values


class OptimizerSource(NamedTuple):
    """Where an optimizer comes from. Its package is imported only when it is asked for."""

    module: str
    name: str
    package: str  # what pip calls it
    adapts_rate: bool = False  # finds its learning rate itself; the one given is a factor, the same for all parts


OPTIMIZERS = {
    "AdamW": OptimizerSource("torch.optim", "AdamW", "torch"),
    "AdamW8bit": OptimizerSource("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "Prodigy": OptimizerSource("prodigyopt", "Prodigy", "prodigyopt", adapts_rate=True),
    "AdamWScheduleFree": OptimizerSource("schedulefree", "AdamWScheduleFree", "schedulefree"),
}


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its learning rates."""

    title: ClassVar[str] = "optimizer"

    optimizer_type: str = option(
        "",
        f"one of: {', '.join(OPTIMIZERS)}, in any spelling of case; AdamW when left out. AdamW8bit keeps its state in "
        "8 bits, but for tensors below 4096 values; Prodigy finds the learning rate itself, give it 1; "
        "AdamWScheduleFree shows and saves an average that takes the place of a falling rate",
        metavar="NAME",
    )
    optimizer_args: tuple[str, ...] | None = option(
        None, "further arguments of the optimizer, such as weight_decay=0.01 betas=.9,.999", metavar="NAME=VALUE"
    )
    learning_rate: float = option(2e-06, "learning rate of everything that has none of its own", metavar="X", minimum=0)
    max_grad_norm: float = option(
        1.0, "scale gradients down where their overall norm is larger; 0 turns this off", metavar="X", minimum=0
    )

    def __post_init__(self) -> None:
        if self.optimizer_type.lower() not in ("", *(name.lower() for name in OPTIMIZERS)):
            raise _unavailable("--optimizer_type", self.optimizer_type, tuple(OPTIMIZERS))
        parse_key_values(self.optimizer_args or (), "--optimizer_args")

    @property
    def optimizer(self) -> str:
        """The optimizer's name in its own spelling."""
        wanted = self.optimizer_type.lower()
        return next((name for name in OPTIMIZERS if name.lower() == wanted), "AdamW")

    @property
    def optimizer_keywords(self) -> dict[str, str]:
        """`optimizer_args` as name -> value, both as written."""
        return parse_key_values(self.optimizer_args or (), "--optimizer_args")

    @property
    def clip_norm(self) -> float | None:
        """The norm gradients are clipped at, None for no clipping."""
        return self.max_grad_norm or None


def _unavailable(flag: str, value: str, names: tuple[str, ...]) -> UserError:
    choices = f"{', '.join(names[:-1])} or {names[-1]}"
    return UserError(f"{flag}: {value} is not available, choose {choices}{suggest(value, names)}")
