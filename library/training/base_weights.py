"""--base_weights: networks that become part of the model before anything else is done with it.

What is trained is trained upon the sum. Files of plain LoRA are read by networks.lora and those of LyCORIS by its own
package, whatever is trained; all others by the --network_module of the run.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from library import console
from library.errors import UserError
from library.models.family import Family
from library.models.files.checkpoint import open_weights
from library.models.registry import ModelInfo
from library.models.views import AttachPoints
from library.options.base import Settings
from library.options.network import NetworkOptions
from library.training.methods.network_module import LYCORIS, failing_as_mistake, import_network_module
from networks import lora

_PLAIN = frozenset({"lora_down.weight", "lora_up.weight", "alpha"})
"""How the names of a LoRA's tensors end, after that of their layer."""
_FACTORS = ("hada_w1_b", "lokr_t2", "lokr_w1", "lokr_w1_a", "lokr_w2_a")
"""Those of LoHa and LoKr that tell their rank, or are multiplied with the others."""
_STARTS = (_TEXT, _UNET) = "lora_te", "lora_unet"
Parts = tuple[nn.Module | list[nn.Module], nn.Module]
"""Text encoder, or all of several, and U-Net, as network modules expect them."""


@dataclass(frozen=True)
class BaseNetwork:
    """A network to be merged into the model, and how strongly. `reader`: the module that reads its file, by name.

    The fingerprints are of its weights and its strength: of all, and of what changes text encoders, empty for nothing.
    """

    path: Path
    multiplier: float
    reader: str
    fingerprint: str
    text_fingerprint: str


def find_base_networks(settings: Settings, info: ModelInfo) -> tuple[BaseNetwork, ...]:
    """Those of --base_weights. UserError for a file that is no network, or none for this model, as far as that can be
    known without the model's weights.
    """
    options = settings.groups.get(NetworkOptions)
    if options is None or not options.base_networks:
        return ()
    model = info.outline()
    return tuple(_find(path, multiplier, options.network_module, model) for path, multiplier in options.base_networks)


def _find(path: Path, multiplier: float, network_module: str, model: Family) -> BaseNetwork:
    tensors = _read(path)
    usual = bool(tensors) and all(name.startswith(_STARTS) for name in tensors)
    reader = lora.__name__ if {name.partition(".")[2] for name in tensors} <= _PLAIN else LYCORIS
    reader = reader if usual else network_module
    if not usual and reader in (lora.__name__, LYCORIS):
        raise UserError(
            f"--base_weights: {path} is no network's file: no tensor's name begins with lora_te or lora_unet"
        )
    points = model.attach_points()
    if reader == lora.__name__:
        with failing_as_mistake(_failure(path, reader)):
            fitting = _names(lora.fitting_weights(tensors, points.text_encoder, points.unet))
    else:
        import_network_module(reader, f"--base_weights: for {path}")
        fitting = _names(tensors) & _modules(points).keys() if usual else _names(tensors)
        if not fitting:
            raise UserError(f"--base_weights: {path} is for another kind of model than this {model.title} model")
    if len(fitting) < len(_names(tensors)):
        console.warn(
            f"--base_weights: {path} has {len(_names(tensors))} modules, of which {len(fitting)} have a layer in the "
            "model: the others are left out"
        )
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith(_UNET)}
    return BaseNetwork(path, multiplier, reader, fingerprint(tensors, multiplier), fingerprint(text, multiplier))


def fingerprint(tensors: Mapping[str, Tensor], multiplier: float) -> str:
    """A hash of tensors and of how strongly they act; empty for none."""
    digest = hashlib.blake2b(f"{multiplier}\n".encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest() if tensors else ""


@torch.no_grad()
def merge_base_networks(networks: Sequence[BaseNetwork], model: Family) -> None:
    """Add them to the model's weights, which are summed up in float32 and rounded to their own format once. UserError
    for a network that its module cannot merge.
    """
    if not networks:
        return
    points = model.attach_points()
    parts = points.text_encoder, points.unet
    plain = [network for network in networks if network.reader == lora.__name__]
    if len(plain) == len(networks):
        _merge_loras(plain, parts)
        networks = plain
    else:
        modules = _modules(points)
        with _in_float32(modules.values()):
            for network in networks:  # in their order, since not all of them add something
                _merge_loras([network], parts) if network in plain else _merge_foreign(network, modules, parts)
    for network in networks:
        console.notice(f"merged into the model: {network.path.name}, at strength {network.multiplier:g}")


def _merge_loras(networks: Sequence[BaseNetwork], parts: Parts) -> None:
    """Low-rank as they are: factors of several are put beside each other, so that each weight is summed up once."""
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for network in networks:
        with failing_as_mistake(_failure(network.path, network.reader)):
            weights = lora.fitting_weights(_read(network.path), *parts)
        for name in _names(weights):
            down, up = (weights[f"{name}.{part}.weight"].float() for part in ("lora_down", "lora_up"))
            scale = network.multiplier * weights[f"{name}.alpha"].item() / len(down)
            factors.setdefault(name, []).append((down, up * scale))
    together: dict[str, Tensor] = {}
    for name, pairs in factors.items():
        downs, ups = zip(*pairs, strict=True)
        down = torch.cat(downs)
        together |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": torch.cat(ups, dim=1)}
        together[f"{name}.alpha"] = torch.tensor(float(len(down)))
    lora.LoRANetwork(()).merge_to(*parts, together)


def _merge_foreign(network: BaseNetwork, modules: Mapping[str, nn.Module], parts: Parts) -> None:
    """As its module merges it. Some merge at full strength only, so the strength is given afterwards."""
    weights = _with_plain_alphas(_read(network.path))
    named = [modules[name] for name in sorted(_names(weights) & modules.keys())] or list(modules.values())
    before = [] if network.multiplier == 1 else [(own, own.clone()) for own in _parameters(named)]
    with failing_as_mistake(_failure(network.path, network.reader)), console.quiet_dependencies():
        made, weights = import_network_module(network.reader).create_network_from_weights(
            1.0, str(network.path), None, *parts, weights_sd=weights, for_inference=True
        )
        made.merge_to(*parts, weights, torch.float32, "cpu")
    for parameter, old in before:
        parameter.copy_(old.lerp(parameter, network.multiplier))


def _with_plain_alphas(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network, in which alpha is the rank of each LoHa and LoKr: where LyCORIS 4.1 merges these, it multiplies
    with alpha / rank twice.
    """
    changed = dict(weights)
    for name in _names(weights):
        own = {key.partition(".")[2]: key for key in (f"{name}.{part}" for part in _FACTORS) if key in weights}
        # (rank, in), and (out, rank) but for Tucker's core of (rank, rank, height, width)
        sizes = [("hada_w1_b", 0), ("lokr_t2", 0), ("lokr_w1_a", 1), ("lokr_w2_a", 1)]
        rank = next((weights[own[part]].shape[axis] for part, axis in sizes if part in own), None)
        if rank is not None and f"{name}.alpha" in weights:
            scaled = next(own[part] for part in ("hada_w1_b", "lokr_w1", "lokr_w1_a") if part in own)
            changed[scaled] = weights[scaled].float() * (weights[f"{name}.alpha"].item() / rank)
            changed[f"{name}.alpha"] = torch.tensor(float(rank))
    return changed


@contextlib.contextmanager
def _in_float32(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, all parameters of these modules are in main memory in float32."""
    homes = [(own, own.device, own.dtype) for own in _parameters(modules)]
    for parameter, _, _ in homes:
        parameter.data = parameter.data.to("cpu", torch.float32)
    try:
        yield
    finally:
        for parameter, device, dtype in homes:
            parameter.data = parameter.data.to(device, dtype)


def _parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Each once."""
    return list(dict.fromkeys(own for module in modules for own in module.parameters()))


def _failure(path: Path, reader: str) -> str:
    return f"--base_weights: {path} cannot be merged into this model by {reader}"


def _read(path: Path) -> dict[str, Tensor]:
    with open_weights(path) as file:
        return file.tensors()


def _names(tensors: Iterable[str]) -> set[str]:
    """Of the modules that the tensors belong to."""
    return {name.partition(".")[0] for name in tensors}


def _modules(points: AttachPoints) -> dict[str, nn.Module]:
    """All that a network can be attached to, by the names in files."""
    several = len(points.text_encoders) > 1
    roots = [(f"{_TEXT}{number}" if several else _TEXT, root) for number, root in enumerate(points.text_encoders, 1)]
    return {
        f"{prefix}_{name}".replace(".", "_"): module
        for prefix, root in (*roots, (_UNET, points.unet))
        for name, module in root.named_modules()
    }
