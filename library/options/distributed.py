"""Several processes, and the engines that spread a model over them."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option

_DEVICES = ("cpu", "nvme")


@dataclass(frozen=True)
class DistributedOptions:
    """What processes started together by `accelerate launch` agree on. One process alone needs none of it."""

    title: ClassVar[str] = "several processes"

    ddp_timeout: int | None = option(
        None,
        "minutes that processes wait for each other within a step; torch's own limit when left out",
        metavar="N",
        minimum=1,
    )
    ddp_gradient_as_bucket_view: bool = option(
        False, "keep gradients in the memory they are exchanged from, which saves as much again"
    )
    ddp_static_graph: bool = option(False, "promise that every step uses the same parameters, which saves a search")
    deepspeed: bool = option(False, "train with DeepSpeed, which has to be installed")
    zero_stage: int = option(
        2,
        "what DeepSpeed spreads over the processes: nothing, optimizer state, gradients too, weights too",
        metavar="N",
        choices=(0, 1, 2, 3),
    )
    offload_optimizer_device: str | None = option(
        None, "where DeepSpeed keeps the optimizer's state instead", metavar="DEVICE", choices=_DEVICES
    )
    offload_optimizer_nvme_path: str | None = option(
        None, "folder on the NVMe disk for the optimizer's state", metavar="FOLDER"
    )
    offload_param_device: str | None = option(
        None, "where DeepSpeed keeps the weights instead; needs --zero_stage 3", metavar="DEVICE", choices=_DEVICES
    )
    offload_param_nvme_path: str | None = option(None, "folder on the NVMe disk for the weights", metavar="FOLDER")
    zero3_init_flag: bool = option(False, "spread weights as soon as they are made; with --zero_stage 3")
    zero3_save_16bit_model: bool = option(
        False, "gather weights in 16 bits where DeepSpeed itself saves them; with --zero_stage 3"
    )
    fp16_master_weights_and_gradients: bool = option(
        False,
        "keep the optimizer's copy of the weights in fp16, too; needs --zero_stage 2, --offload_optimizer_device cpu "
        "and --mixed_precision fp16",
    )

    def __post_init__(self) -> None:
        if not self.deepspeed:
            return
        for part in ("optimizer", "param"):
            device, path = getattr(self, f"offload_{part}_device"), getattr(self, f"offload_{part}_nvme_path")
            if device == "nvme" and not path:
                raise UserError(
                    f"--offload_{part}_device nvme needs a folder on that disk, give it as --offload_{part}_nvme_path"
                )
            if path and device != "nvme":
                raise UserError(
                    f"--offload_{part}_nvme_path is only used with --offload_{part}_device nvme: add that, or leave "
                    "the path out"
                )
        if self.zero_stage < 3 and self.param_device != "none":
            raise UserError(
                f"--offload_param_device {self.param_device} needs the weights to be spread: use --zero_stage 3"
            )
        if self.zero_stage < 2 and self.optimizer_device != "none":
            raise UserError(f"--offload_optimizer_device {self.optimizer_device} needs --zero_stage 2 or 3")
        if self.fp16_master_weights_and_gradients and (self.zero_stage != 2 or self.optimizer_device != "cpu"):
            raise UserError(
                "--fp16_master_weights_and_gradients works with --zero_stage 2 and --offload_optimizer_device cpu only"
            )

    @property
    def optimizer_device(self) -> str:
        """Where the optimizer's state is kept; "none": beside the weights."""
        return self.offload_optimizer_device or "none"

    @property
    def param_device(self) -> str:
        """Where the weights are kept; "none": where they are used."""
        return self.offload_param_device or "none"
