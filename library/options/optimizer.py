"""What moves the weights, and how fast."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from library.errors import UserError, suggest
from library.options.base import option, parse_key_values


class OptimizerSource(NamedTuple):
    """Where an optimizer comes from. Its package is imported only when it is asked for."""

    module: str
    name: str
    package: str  # what pip calls it
    adapts_rate: bool = False  # finds its learning rate itself; the one given is a factor
    arguments: Mapping[str, Any] = {}  # added to --optimizer_args where they are not given


def _bitsandbytes(name: str, **arguments: Any) -> OptimizerSource:
    return OptimizerSource("bitsandbytes.optim", name, "bitsandbytes", arguments=arguments)


def _dadaptation(name: str, module: str = "dadaptation") -> OptimizerSource:
    return OptimizerSource(module, name, "dadaptation", adapts_rate=True)


def _schedulefree(name: str) -> OptimizerSource:
    return OptimizerSource("schedulefree", name, "schedulefree")


_NESTEROV = {"momentum": 0.9, "nesterov": True}

OPTIMIZERS = {
    "AdamW": OptimizerSource("torch.optim", "AdamW", "torch"),
    "AdamW8bit": _bitsandbytes("AdamW8bit"),
    "PagedAdamW": _bitsandbytes("PagedAdamW"),
    "PagedAdamW8bit": _bitsandbytes("PagedAdamW8bit"),
    "PagedAdamW32bit": _bitsandbytes("PagedAdamW32bit"),
    "AdEMAMix8bit": _bitsandbytes("AdEMAMix8bit"),
    "Lion": OptimizerSource("lion_pytorch", "Lion", "lion-pytorch"),
    "Lion8bit": _bitsandbytes("Lion8bit"),
    "PagedLion8bit": _bitsandbytes("PagedLion8bit"),
    "SGDNesterov": OptimizerSource("torch.optim", "SGD", "torch", arguments=_NESTEROV),
    "SGDNesterov8bit": _bitsandbytes("SGD8bit", **_NESTEROV),
    "AdaFactor": OptimizerSource(
        "transformers.optimization", "Adafactor", "transformers", arguments={"relative_step": True}
    ),
    "Prodigy": OptimizerSource("prodigyopt", "Prodigy", "prodigyopt", adapts_rate=True),
    "DAdaptAdamPreprint": _dadaptation("DAdaptAdamPreprint", "dadaptation.experimental"),
    "DAdaptAdam": _dadaptation("DAdaptAdam"),
    "DAdaptAdaGrad": _dadaptation("DAdaptAdaGrad"),
    "DAdaptAdan": _dadaptation("DAdaptAdan"),
    "DAdaptAdanIP": _dadaptation("DAdaptAdanIP", "dadaptation.experimental"),
    "DAdaptLion": _dadaptation("DAdaptLion"),
    "DAdaptSGD": _dadaptation("DAdaptSGD"),
    "AdamWScheduleFree": _schedulefree("AdamWScheduleFree"),
    "RAdamScheduleFree": _schedulefree("RAdamScheduleFree"),
    "SGDScheduleFree": _schedulefree("SGDScheduleFree"),
}
TORCH_OPTIMIZERS = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "Adamax",
    "ASGD",
    "LBFGS",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
    "SparseAdam",
)
"""The classes of torch.optim that no row of OPTIMIZERS is spelled like."""
_OTHER_NAMES = {"DAdaptation": "DAdaptAdamPreprint"}
_SPELLINGS = {name.lower(): name for name in (*OPTIMIZERS, *TORCH_OPTIMIZERS)} | {
    other.lower(): name for other, name in _OTHER_NAMES.items()
}
_UNFIT = {
    "LBFGS": "computes the loss several times in a step",
    "SparseAdam": "is for gradients that are mostly 0 and stored as such",
}
_FLAGS = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its learning rates."""

    title: ClassVar[str] = "optimizer"

    optimizer_type: str = option(
        "",
        f"one of: {', '.join(OPTIMIZERS)}, a class of torch.optim, or any other as module.Class; AdamW when left out",
        metavar="NAME",
    )
    use_8bit_adam: bool = option(False, "the same as --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "the same as --optimizer_type Lion")
    optimizer_args: tuple[str, ...] | None = option(
        None, "further arguments of the optimizer, such as weight_decay=0.01 betas=.9,.999", metavar="NAME=VALUE"
    )
    learning_rate: float = option(2e-06, "learning rate of everything that has none of its own", metavar="X", minimum=0)
    max_grad_norm: float = option(
        1.0, "scale gradients down where their overall norm is larger; 0 turns this off", metavar="X", minimum=0
    )

    def __post_init__(self) -> None:
        asked = [f"--{flag}" for flag in _FLAGS if getattr(self, flag)]
        if len(asked) > 1 or (asked and self.optimizer_type):
            kept = "--optimizer_type" if self.optimizer_type else asked.pop()
            raise UserError(f"{' and '.join(asked)} and {kept} each name an optimizer: drop {' and '.join(asked)}")
        name = self.optimizer_type
        dotted = "." in name and all(part.isidentifier() for part in name.split("."))
        if name and name.lower() not in _SPELLINGS and not dotted:
            raise UserError(
                f"--optimizer_type: {name} is none of those in --help, no class of torch.optim, and not written as "
                f"module.Class{suggest(name, _SPELLINGS.values())}"
            )
        if self.optimizer in _UNFIT:
            raise UserError(f"--optimizer_type: {self.optimizer} {_UNFIT[self.optimizer]}: choose another")
        parse_key_values(self.optimizer_args or (), "--optimizer_args")

    @property
    def optimizer(self) -> str:
        """The optimizer's name in its own spelling: one of OPTIMIZERS or TORCH_OPTIMIZERS, or module.Class."""
        asked = next((name for flag, name in _FLAGS.items() if getattr(self, flag)), self.optimizer_type or "AdamW")
        return _SPELLINGS.get(asked.lower(), asked)

    @property
    def source(self) -> OptimizerSource:
        """Where it comes from."""
        if self.optimizer in OPTIMIZERS:
            return OPTIMIZERS[self.optimizer]
        module, _, name = self.optimizer.rpartition(".")
        module = module or "torch.optim"
        package = module.partition(".")[0]
        adapts = any(row.adapts_rate and (row.package, row.name) == (package, name) for row in OPTIMIZERS.values())
        return OptimizerSource(module, name, package, adapts)

    @property
    def optimizer_keywords(self) -> dict[str, str]:
        """`optimizer_args` as name -> value, both as written."""
        return parse_key_values(self.optimizer_args or (), "--optimizer_args")

    @property
    def clip_norm(self) -> float | None:
        """The norm gradients are clipped at, None for no clipping."""
        return self.max_grad_norm or None
