"""A network that goes on from the weights in a file: whether they fit it, and how it takes them over."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.console import warn
from library.errors import UserError, some
from library.models.family import Family
from library.models.files.checkpoint import open_weights, write_tensors
from library.models.registry import FAMILIES
from library.training.methods.network_module import called

Parts = dict[str, dict[str, Tensor]]
"""Tensors by the module of the network that they belong to, and by their names in it."""

_FLAG = "--network_weights"
_MAGNITUDES = "dora_scale"  # of a DoRA
_RANKED = "lora_down.weight"  # (rank, ...)


class OtherAlpha(UserError):
    """For a network in which a module's alpha is not `alpha`, that of the file."""

    def __init__(self, sentence: str, alpha: float):
        super().__init__(sentence)
        self.alpha = alpha


def read_network(path: Path) -> dict[str, Tensor]:
    """The tensors of a network's file, in float32, with an alpha for every low-rank module: its rank where the file has
    none. UserError if it is none or damaged.
    """
    with open_weights(path) as file:
        file.verify()
        tensors = file.tensors()
    tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    ranks = {key.removesuffix(_RANKED): len(down) for key, down in tensors.items() if key.endswith(f".{_RANKED}")}
    return {f"{name}alpha": torch.tensor(float(rank)) for name, rank in ranks.items()} | tensors


def with_own_names(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the names that the network itself would give them, where it knows of others."""
    rename = getattr(network, "own_weights", dict)
    try:
        return rename(tensors)
    except ValueError as error:
        raise UserError(f"{_FLAG}: {error}") from error


def content(network: nn.Module, name: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file of the network would hold now, by the names there: usually those of its `state_dict`, else it writes
    one. `like` has the names of some file.
    """
    held = network.state_dict()
    if held.keys() & like.keys():
        return held
    empty = any(parameter.is_meta for parameter in network.parameters())
    with tempfile.TemporaryDirectory() as folder, called(name, "save_weights", without_values=empty):
        draft = Path(folder) / "network.safetensors"
        network.save_weights(str(draft), None, None)
        with open_weights(draft) as file:
            return file.tensors()


@contextlib.contextmanager
def naming_family(path: Path, tensors: Mapping[str, Tensor], model: Family) -> Iterator[None]:
    """While it lasts, a UserError about a file for another family of models than this one says just that."""
    try:
        yield
    except UserError as error:
        with open_weights(path) as file:
            told = file.metadata.get("ss_base_model_version")
        titles = {family.base_model_version: family.title for family in FAMILIES}
        theirs = titles.get(told, "")
        if not theirs and any(key.startswith(("lora_te1_", "lora_te2_")) for key in tensors):
            theirs = "SDXL"
        elif not theirs and any(key.startswith("lora_te_") for key in tensors) and len(model.text_encoders) > 1:
            theirs = "Stable Diffusion 1.x or 2.x"
        if theirs in ("", model.title):
            raise
        own = model.title
        raise UserError(f"{_FLAG}: {path} is for {theirs}, and this model is {own}: give one for that") from error


def check_fit(network: nn.Module, name: str, path: Path, tensors: Mapping[str, Tensor], *, made_from_it: bool) -> None:
    """Say what of the file and of the network has no counterpart. UserError where nothing has one, and where a network
    of another kind or rank is in the file, OtherAlpha for one of another alpha. `made_from_it`: the network has its
    ranks and alphas from it.
    """
    own, theirs = _by_module(content(network, name, tensors)), _by_module(tensors)
    for key in own.keys() & theirs.keys():
        _forget_needless_alpha(own[key], theirs[key])
    shared = sorted(own.keys() & theirs.keys())
    if not shared:
        there, here = (min(parts) if parts else "nothing" for parts in (theirs, own))
        raise UserError(
            f"{_FLAG}: nothing in {path} fits this network, it is of another kind of model or network: it has {there}, "
            f"and this one {here}"
        )
    for key in shared:
        if _MAGNITUDES in own[key].keys() ^ theirs[key].keys():
            kinds = ("a DoRA", "none") if _MAGNITUDES in theirs[key] else ("no DoRA", "one")
            raise UserError(
                f"{_FLAG}: {path} is {kinds[0]} and this network is {kinds[1]}: give --network_args "
                f"dora_wd={_MAGNITUDES in theirs[key]}"
            )
        if own[key].keys() != theirs[key].keys():
            there, here = (", ".join(sorted(parts[key])) or "one tensor" for parts in (theirs, own))
            raise UserError(
                f"{_FLAG}: {path} is of another kind of network, {key} has {there} there and {here} here: give the "
                "--network_module and --network_args that it was made with"
            )
    matched = {key: own[key] for key in shared}
    _check_shapes(matched, theirs, path)
    if not made_from_it:
        _check_alphas(matched, theirs, path)
    if absent := sorted(own.keys() - theirs.keys()):
        warn(f"{path} has nothing for {len(absent)} of the network's {len(own)} modules, which are new: {some(absent)}")
    if unknown := sorted(theirs.keys() - own.keys()):
        warn(f"{len(unknown)} of the {len(theirs)} modules in {path} are not of this network: {some(unknown)}")


def _forget_needless_alpha(own: Mapping[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """One that changes nothing, of a module that has none."""
    if "alpha" not in own and "alpha" in theirs and _RANKED in theirs and theirs["alpha"] == len(theirs[_RANKED]):
        del theirs["alpha"]


def _check_shapes(own: Parts, theirs: Parts, path: Path) -> None:
    for name, parts in own.items():
        for part, tensor in parts.items():
            here, there = tensor.shape, theirs[name][part].shape
            if here == there:
                continue
            if part == _RANKED and here[1:] == there[1:]:
                ranks = {len(parts[_RANKED]) for parts in theirs.values() if _RANKED in parts}
                dim = f"--network_dim {there[0]} or " if len(ranks) == 1 else ""
                raise UserError(
                    f"{_FLAG}: {path} has rank {there[0]} for {name}, not {here[0]}: give {dim}--dim_from_weights"
                )
            shapes = ["x".join(map(str, shape)) or "one number" for shape in (there, here)]
            raise UserError(
                f"{_FLAG}: {name}.{part} is {shapes[0]} in {path} and {shapes[1]} here, so it was made for another "
                "kind of model, or with other --network_dim and --network_args, for which there is --dim_from_weights"
            )


def _check_alphas(own: Parts, theirs: Parts, path: Path) -> None:
    """Networks compute with what they have made of alpha at first, so that one in a file comes too late."""
    alphas = {float(parts["alpha"]) for parts in theirs.values() if "alpha" in parts}
    for name, parts in own.items():
        if "alpha" not in parts or not parts["alpha"].numel() == theirs[name]["alpha"].numel() == 1:
            continue
        here, there = float(parts["alpha"]), float(theirs[name]["alpha"])
        if abs(here - there) > 0.01 * abs(there):  # that of a file may be rounded to 8 bits
            value = f"--network_alpha {there:g} or " if len(alphas) == 1 else ""
            raise OtherAlpha(
                f"{_FLAG}: {path} has alpha {there:g} for {name}, not {here:g}: give {value}--dim_from_weights", there
            )


@torch.no_grad()
def take_over(network: nn.Module, name: str, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Give a network, whose parameters are in float32, the tensors of a file that fits it. UserError if it does not
    take them.

    It reads them from a draft that is whole and in float32: some networks fail where a module is missing, and some add
    what they read to weights that they round to the file's format.
    """
    if any(parameter.is_meta for parameter in network.parameters()):
        return
    held = content(network, name, tensors)
    wanted = {key: tensor for key, tensor in tensors.items() if key in held}
    if _differing(held, wanted) is None:
        return
    with tempfile.TemporaryDirectory() as folder, called(name, "load_weights", _FLAG):
        draft = Path(folder) / "network.safetensors"
        write_tensors(draft, {key: tensor.detach().cpu() for key, tensor in {**held, **wanted}.items()})
        network.load_weights(str(draft))
    if differing := _differing(content(network, name, tensors), wanted):
        raise UserError(
            f"{_FLAG}: networks of {name} do not take over what is in {path}, such as {differing}: try it with "
            "--dim_from_weights, or leave that out"
        )


def _differing(held: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """The first tensor that is another, apart from roundings."""
    for key, tensor in wanted.items():
        if not torch.allclose(held[key].cpu().float(), tensor.float(), rtol=1e-3, atol=1e-6):
            return key
    return None


def _by_module(tensors: Mapping[str, Tensor]) -> Parts:
    parts: Parts = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        parts.setdefault(name, {})[part] = tensor
    return parts


def ranks_and_alphas(network: nn.Module) -> tuple[set[float], set[float]]:
    """Those of the modules of a network."""
    modules = list(network.children())
    ranks = {part.lora_dim for part in modules if isinstance(getattr(part, "lora_dim", None), int)}
    return ranks, {float(part.alpha) for part in modules if isinstance(getattr(part, "alpha", None), Tensor)}
