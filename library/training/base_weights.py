"""--base_weights: networks that become part of the model before anything else is done with it.

What is trained is trained upon the sum. Networks of the kinds that library.lora knows are merged by it, whichever
program has written them, layers of other kinds by LyCORIS; files that are no networks to it by the --network_module of
the run.
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
from library.lora.changes import change_layer, misfit_of
from library.lora.names import UNET, named_modules
from library.lora.reading import NetworkFile, NotANetwork, UnknownKind, open_network
from library.models.family import Family
from library.models.files.checkpoint import open_weights
from library.models.registry import ModelInfo
from library.models.views import AttachPoints
from library.options.base import Settings
from library.options.network import NetworkOptions
from library.training.methods.network_module import LYCORIS, failing_as_mistake, import_network_module
from networks import lora


@dataclass(frozen=True)
class BaseNetwork:
    """A network to be merged into the model, and how strongly. `reader`: the module that merges what library.lora does
    not know, by name; empty if there is nothing.

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
    points = model.attach_points()
    text = {key: tensor for key, tensor in tensors.items() if not key.startswith(UNET)}
    try:
        network = open_network(path, points.unet)
    except NotANetwork as problem:
        if network_module in (lora.__name__, LYCORIS):
            raise UserError(f"--base_weights: {problem}") from None
        reader = network_module
    except UserError as problem:
        raise UserError(f"--base_weights: {problem}") from None
    else:
        with network:
            reader = LYCORIS if _unknown_layers(network, named_modules(points), model) else ""
            of_text = [parts.values() for name, parts in network.layers.items() if not name.startswith(UNET)]
            text = {key: tensors[key] for keys in of_text for key in keys}
    if reader:
        import_network_module(reader, f"--base_weights: for {path}")
    return BaseNetwork(path, multiplier, reader, fingerprint(tensors, multiplier), fingerprint(text, multiplier))


def _unknown_layers(network: NetworkFile, modules: Mapping[str, nn.Module], model: Family) -> list[str]:
    """The layers of a kind that is not known. UserError if they are not those of the model; a rest is named."""
    other = f"--base_weights: {network.path} is for another kind of model than this {model.title} model"
    unknown = []
    shared = [name for name in network.layers if name in modules]
    if not shared:
        raise UserError(other)
    for name in shared:
        try:
            if reason := misfit_of(network.change(name), modules[name]):
                raise UserError(f"{other}, it does not fit {name} ({reason})")
        except UnknownKind:
            unknown.append(name)
    if len(shared) < len(network.layers):
        console.warn(
            f"--base_weights: {network.path} has {len(network.layers)} modules, of which {len(shared)} have a layer in "
            "the model: the others are left out"
        )
    return unknown


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
    modules = named_modules(points)
    if not any(network.reader for network in networks):
        _merge(networks, modules, points)
    else:
        with _in_float32(modules.values()):
            for network in networks:  # in their order, since not all of them add something
                if network.reader in ("", LYCORIS):
                    _merge([network], modules, points)
                if network.reader:
                    _merge_foreign(network, modules, points)
    for network in networks:
        console.notice(f"merged into the model: {network.path.name}, at strength {network.multiplier:g}")


def _merge(networks: Sequence[BaseNetwork], modules: Mapping[str, nn.Module], points: AttachPoints) -> None:
    """What library.lora knows of them, layer by layer."""
    with contextlib.ExitStack() as stack:
        opened = [
            (stack.enter_context(open_network(network.path, points.unet)), network.multiplier) for network in networks
        ]
        for name, layer in modules.items():
            changes = []
            for network, multiplier in opened:
                with contextlib.suppress(UnknownKind):
                    if name in network.layers:
                        changes.append((network.change(name), multiplier))
            if changes:
                change_layer(layer, changes)


def _merge_foreign(network: BaseNetwork, modules: Mapping[str, nn.Module], points: AttachPoints) -> None:
    """As its module merges it. Some merge at full strength only, so the strength is given afterwards."""
    parts = points.text_encoder, points.unet
    weights = _read(network.path) if network.reader != LYCORIS else _unknown_tensors(network.path, modules, points)
    names = {key.partition(".")[0] for key in weights}
    named = [modules[name] for name in sorted(names & modules.keys())] or list(modules.values())
    before = [] if network.multiplier == 1 else [(own, own.clone()) for own in _parameters(named)]
    failure = f"--base_weights: {network.path} cannot be merged into this model by {network.reader}"
    with failing_as_mistake(failure), console.quiet_dependencies():
        made, weights = import_network_module(network.reader).create_network_from_weights(
            1.0, str(network.path), None, *parts, weights_sd=weights, for_inference=True
        )
        made.merge_to(*parts, weights, torch.float32, "cpu")
    for parameter, old in before:
        parameter.copy_(old.lerp(parameter, network.multiplier))


def _unknown_tensors(path: Path, modules: Mapping[str, nn.Module], points: AttachPoints) -> dict[str, Tensor]:
    """Those of the layers whose kind library.lora does not know."""
    tensors = {}
    with open_network(path, points.unet) as network:
        for name in network.layers:
            try:
                network.change(name)
            except UnknownKind:
                tensors |= {f"{name}.{part}": tensor for part, tensor in network.tensors(name).items()}
    return {key: tensor for key, tensor in tensors.items() if key.partition(".")[0] in modules}


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


def _read(path: Path) -> dict[str, Tensor]:
    with open_weights(path) as file:
        return file.tensors()
