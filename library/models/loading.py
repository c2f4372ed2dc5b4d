"""Weights from files into modules: each tensor is read once, straight into its place, in the precision asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library import console
from library.errors import UserError, some
from library.models.family import Family
from library.models.files.checkpoint import WeightsFile
from library.models.sgm_keys import VAE_PREFIX, KeyMap, Shapes, is_carried, is_dropped, usual_keys, usual_shapes


def load_vae(
    family: type[Family],
    file: WeightsFile,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Family:
    """A model whose autoencoder is read, in evaluation mode, and nothing else: its other weights are nowhere.

    UserError if the file's autoencoder is not complete.
    """
    model = outline(family, file)
    component = model.components()["vae"]
    _fill(component.module, component.names, file, usual_keys(file), dtype=dtype, device=device)
    _assert_materialised(model.vae)
    return model.eval()


def load_text_encoders(
    family: type[Family],
    file: WeightsFile,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Family:
    """A model whose text encoders are read, in evaluation mode, and nothing else: its other weights are nowhere.

    UserError if they are not complete.
    """
    model = outline(family, file)
    keys, encoders = usual_keys(file), [encoder.model for encoder in model.text_encoders]
    for module, names in model.components().values():
        if any(module is encoder for encoder in encoders):
            _fill(module, names, file, keys, dtype=dtype, device=device)
    model.rebuild_buffers(device)
    _assert_materialised(model.text_encoders)
    return model.eval()


def load(
    family: type[Family],
    file: WeightsFile,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    vae_dtype: torch.dtype | None = None,
    vae_device: torch.device | str | None = None,
    exact: Callable[[str], bool] = lambda component: False,
) -> Family:
    """Read a model, in evaluation mode; `vae_dtype` and `vae_device` are the autoencoder's if they differ. Without
    `dtype` each tensor keeps the number format it is stored in, to be written again. Those of `Family.components` that
    are `exact` are read in float32.

    Averaged copies of the weights and parts of losses are left out, and counted. UserError if the file is not a
    complete model of this family, or holds tensors that none has.
    """
    model = outline(family, file)
    keys = usual_keys(file)
    rest = sorted(keys.keys() - model.tensors().keys())
    dropped = [name for name in rest if is_dropped(name)]
    _check_rest(model, file, keys, rest)
    if dropped:
        console.notice(f"{file.path}: {len(dropped)} tensors of its training (averaged weights, losses) are left out")
    for component, (module, names) in model.components().items():
        own, place = (vae_dtype or dtype, vae_device or device) if module is model.vae else (dtype, device)
        _fill(module, names, file, keys, dtype=torch.float32 if exact(component) else own, device=place)
    for name in rest:
        if not is_dropped(name):
            # position ids and tables of the noise schedule are no weights
            weight = name.startswith(family.text_outputs.prefixes) and not name.endswith("position_ids")
            model.carried[name] = file.get(keys[name], dtype if weight else None)
    _repair_position_ids(model, file)
    model.rebuild_buffers(device)
    _assert_materialised(model)
    return model.eval()


def outline(family: type[Family], file: WeightsFile) -> Family:
    """The model that a file holds, on the meta device."""
    with torch.device("meta"), complete(family, file):
        model = family.build(usual_shapes(file), file.configs)
    text, unet = sum(encoder.clip.config.hidden_size for encoder in model.text_encoders), model.unet.config
    if text != unet.cross_attention_dim:
        raise UserError(
            f"{file.path} does not fit together: its text encoder gives {text} values a token, its U-Net reads "
            f"{unet.cross_attention_dim}"
        )
    return model


def _check_rest(model: Family, file: WeightsFile, keys: Mapping[str, str], rest: Sequence[str]) -> None:
    """Whether the file may hold this `rest`, which no module uses; a layer is in it whole or not at all."""
    unused = model.unused_layer()
    unknown = [keys[name] for name in rest if not (is_dropped(name) or is_carried(name) or name in unused)]
    if unknown:
        raise UserError(f"{file.path} holds tensors that no {model.title} model has: {some(unknown)}")
    missing = [name for name in unused if name not in keys]
    _refuse(file, missing if len(missing) < len(unused) else [], _misshapen(file, keys, unused))


def _misshapen(file: WeightsFile, keys: Mapping[str, str], shapes: Shapes) -> list[str]:
    """Those of the file's tensors, as in a sentence, that have other shapes than these."""
    return [
        f"{keys[name]} has shape {file.shape(keys[name])}, not {tuple(shape)}"
        for name, shape in shapes.items()
        if name in keys and _without_trailing_ones(file.shape(keys[name])) != _without_trailing_ones(shape)
    ]


def _refuse(file: WeightsFile, missing: Sequence[str], misshapen: Sequence[str]) -> None:
    if missing:
        raise UserError(f"{file.path} lacks {some(missing)}: it is not a complete Stable Diffusion model")
    if misshapen:
        raise UserError(f"{file.path} does not fit together: {some(misshapen)}")


def _fill(
    module: nn.Module,
    names: KeyMap,
    file: WeightsFile,
    keys: Mapping[str, str],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Fill a module built on the meta device from an original file.

    `keys` maps the layout's own names to the file's. UserError names the first tensors that are missing or have another
    shape than the module's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    places = names.places(shapes)
    missing = [place.key for place in places if place.key not in keys]
    _refuse(file, missing, _misshapen(file, keys, {place.key: place.shape(shapes) for place in places}))
    state: dict[str, Tensor] = {}
    for place in places:
        parts = place.divide(file.get(keys[place.key], dtype), shapes)
        state |= {name: part.to(device) for name, part in parts.items()}
    module.load_state_dict(state, assign=True)


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Linear and 1x1 convolution weights hold the same numbers."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def _repair_position_ids(model: Family, file: WeightsFile) -> None:
    """Position ids count from 0; merging in low precision has broken them in many files. No module reads them."""
    for name, tensor in model.carried.items():
        right = torch.arange(tensor.numel()).reshape(tensor.shape)
        if name.endswith("position_ids") and not torch.equal(tensor.double(), right.double()):
            console.warn(f"{file.path}: its position ids are damaged, as by a merge; the right ones are used and saved")
            model.carried[name] = right


def _assert_materialised(module: nn.Module) -> None:
    """No parameter or buffer may be left on the meta device: computing with one gives garbage without an error."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"never filled: {some(left)}"


@contextmanager
def complete(family: type[Family], file: WeightsFile) -> Iterator[None]:
    """Say which tensor is missing, or that shapes make no model, where an architecture is read off a file."""
    try:
        yield
    except KeyError as error:
        if str(error.args[0]).startswith(VAE_PREFIX) and not any(
            key.startswith(VAE_PREFIX) for key in usual_shapes(file)
        ):
            raise UserError(f"{file.path} has no autoencoder: name a file that has one with --vae") from error
        raise UserError(f"{file.path} lacks {error.args[0]}: it is not a complete {family.title} model") from error
    except (IndexError, TypeError, ValueError, ArithmeticError) as error:  # from Diffusers' classes, too
        raise UserError(
            f"{file.path} does not fit together: no {family.title} model has tensors of such names and shapes, "
            "give another copy of it"
        ) from error
