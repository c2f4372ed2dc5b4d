"""Where models come from: single files, Diffusers folders, the hub; with another one's autoencoder if asked for."""

import os

from library.errors import UserError
from library.models.files.checkpoint import WeightsFile, open_weights
from library.models.files.diffusers_folder import config_beside, open_component, open_folder, with_original_names
from library.models.files.hub import find_model
from library.models.files.selection import Selection, part_of, renamed
from library.models.sgm_keys import VAE_PREFIX, is_dropped, usual_spelling

# Names of an autoencoder alone: in the original layout and in Diffusers'.
_ORIGINAL, _DIFFUSERS = "encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"


def open_model(
    name: str | os.PathLike, vae: str | os.PathLike | None = None, variant: str | None = None
) -> WeightsFile:
    """A model's tensors under the names of the original layout: from a file, a Diffusers folder or a repository of the
    hub, weights of a `variant` before others. With `vae`, its autoencoder is the one found there (see `open_vae`); its
    own need not exist.

    UserError if there is no such thing, or it is damaged.
    """
    path = find_model(name, variant=variant)
    replaced = () if vae is None else ("vae",)
    file = open_folder(path, variant, without=replaced) if path.is_dir() else open_weights(path)
    if vae is None:
        return file
    try:
        autoencoder = open_vae(vae)
    except BaseException:
        file.close()
        raise
    own = {key: (file, key) for key in file.keys() if not usual_spelling(key).startswith(VAE_PREFIX)}  # noqa: SIM118
    entries = own | {key: (autoencoder, key) for key in autoencoder.keys()}  # noqa: SIM118 - files are no mappings
    configs = {name: config for name, config in file.configs.items() if name != "vae"}
    return Selection(file.path, entries, [file, autoencoder], file.metadata, {**configs, **autoencoder.configs})


def open_vae(name: str | os.PathLike) -> WeightsFile:
    """An autoencoder's tensors under the names they have in a complete original file. It may stand alone in a file, in
    the original or in Diffusers' layout, or in a folder or repository of Diffusers', or be part of a complete model.
    Of weights that were taken from a folder of Diffusers' the configuration beside them is read, too.
    """
    path = find_model(name, flag="--vae")
    if path.is_dir():
        return open_component(path / "vae" if (path / "vae").is_dir() else path, "vae")
    file = open_weights(path)
    keys = [key for key in file.keys() if not is_dropped(key)]  # noqa: SIM118
    if any(key.startswith(VAE_PREFIX) for key in keys):
        return part_of(file, VAE_PREFIX)
    if _ORIGINAL in keys:
        return renamed(file, {f"{VAE_PREFIX}{key}": key for key in keys if not is_dropped(f"{VAE_PREFIX}{key}")})
    if _DIFFUSERS in keys:
        try:
            config = config_beside(path)
            return with_original_names(file, "vae", {"vae": config} if config else None)
        except BaseException:
            file.close()
            raise
    file.close()
    raise UserError(f"--vae: {path} holds no autoencoder of Stable Diffusion")
