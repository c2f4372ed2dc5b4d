"""Whether the installed torch can use this machine's GPU, in which precision, and how it computes attention: pure
decisions, a `probe`, and trials.
"""

import os
import platform
from dataclasses import dataclass

import torch

from library import console
from library.environment import Card, find_cards, install_command, torch_build
from library.errors import UserError
from library.models import attention
from library.models.family import Family
from library.options.attention import AttentionOptions
from library.training.device.precision import Precision


@dataclass(frozen=True)
class Hardware:
    """What torch and the driver say, as far as a decision depends on it."""

    device: str  # the type of torch device that training will use: "cuda", "mps", "cpu" ...
    torch_version: str  # without its build: "2.13.0"
    system: str  # platform.system()
    cuda_version: str | None = None  # what torch was built for; None for CPU, ROCm and macOS builds
    architectures: tuple[str, ...] = ()  # what its kernels were compiled for: "sm_75", "compute_120" ...
    card: Card | None = None  # the NVIDIA card torch uses, or could use
    bf16: bool = True  # whether the device computes in bfloat16 rather than emulating or refusing it


def supports(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether kernels for `architectures` run on a card of this compute capability.

    Machine code (`sm_XY`) runs on cards of the same major version and at least that minor one, unless a letter ties
    it to exactly one; intermediate code (`compute_XY`) is compiled by the driver for any card from there on.
    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        base = (int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1]))
        if base == capability:
            return True
        if number.isdigit() and base < capability and (kind == "compute" or base[0] == capability[0]):
            return True
    return False


def judge(hardware: Hardware) -> str | None:
    """A notice for a card that torch leaves idle, None when all is well.

    Raises:
        UserError: torch would use the card, but has no kernels for it.
    """
    card = hardware.card
    if card is None:
        return None
    command = install_command(hardware.torch_version, torch_build(hardware.system, [card]))
    if hardware.device == "cuda":
        if supports(card.capability, hardware.architectures):
            return None
        raise UserError(
            f"the installed torch {hardware.torch_version} has no code for {card.name} (compute capability "
            f"{'.'.join(map(str, card.capability))}, torch has {', '.join(hardware.architectures)}): run `{command}`"
        )
    if hardware.cuda_version is None:
        return f"{card.name} is not used, because this torch is built for the CPU alone: run `{command}`"
    return (
        f"{card.name} is not used, because torch cannot open it: its driver {card.driver} may be too old for CUDA "
        f"{hardware.cuda_version}; update the driver or run `{command}`"
    )


def usable_precision(wanted: str, hardware: Hardware) -> tuple[str, str | None]:
    """The mixed precision to train in ("no", "fp16", "bf16"), and a notice where that is not the wanted one.

    Raises:
        UserError: bf16 on a device without it; fp16 in its place would be another training.
    """
    if wanted == "fp16" and hardware.device == "cpu":
        return "bf16", "--mixed_precision fp16 needs a GPU: training in bf16 on this CPU"
    if wanted == "bf16" and not hardware.bf16:
        name = hardware.card.name if hardware.card else f"this {hardware.device} device"
        raise UserError(f"{name} cannot compute in bf16: use --mixed_precision fp16 or no")
    return wanted, None


def probe(device: torch.device) -> Hardware:
    """Looks at torch, and at the driver where torch does not use a card that might be there."""
    known = {"device": device.type, "torch_version": torch.__version__.partition("+")[0], "system": platform.system()}
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        card = Card(torch.cuda.get_device_name(device), capability)
        return Hardware(
            **known,
            cuda_version=torch.version.cuda,
            architectures=tuple(torch.cuda.get_arch_list()),
            card=card,
            bf16=capability >= (8, 0),
        )
    if device.type == "mps":
        return Hardware(**known, bf16=torch.backends.mps.is_macos_or_newer(14, 0))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if device.type != "cpu" or hidden or torch.cuda.is_available():
        return Hardware(**known)
    return Hardware(**known, cuda_version=torch.version.cuda, card=next(iter(find_cards()), None))


def settle_precision(wanted: str, device: torch.device) -> str:
    """Checks the device before anything is loaded onto it and returns the mixed precision it can train in.

    Raises:
        UserError: the installed torch has no code for this card.
    """
    hardware = probe(device)
    precision, change = usable_precision(wanted, hardware)
    for notice in (judge(hardware), change):
        if notice is not None:
            console.notice(notice)
    return precision


_WHY_NOT = {
    "mem_eff_attn": "torch has no kernel for it on this device",
    "xformers": "xformers needs an NVIDIA GPU, and to be built for the installed torch",
}


def choose_attention(options: AttentionOptions, model: Family, formats: Precision, device: torch.device) -> None:
    """Have attention computed as asked for. What cannot be used is said, and that torch chooses in its place, whose
    result is the same. Of xformers the autoencoder has a part, too, where it can.
    """
    wanted = options.wanted
    if len(wanted) > 1:
        console.notice(f"{', '.join(wanted.values())}: the first of these that this machine can use is used")
    for way, flag in wanted.items():
        if way == "sdpa":
            return
        with console.quiet_dependencies():
            works = attention.works(way, model.unet, device, formats.frozen)
            in_vae = works and way == "xformers" and attention.works(way, model.vae, device, formats.vae)
        if works:
            attention.use(way, model.unet)
            if in_vae:
                attention.use(way, model.vae)
            return
        console.notice(f"{flag} cannot be used here: {_WHY_NOT[way]}; torch chooses how attention is computed")
