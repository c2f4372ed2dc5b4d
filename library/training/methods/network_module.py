"""Network modules, ours and other people's: how one is found, and what becomes of an error in it.

What they print goes to the log file, and so does the traceback of what they raise: the user gets one sentence.
"""

import contextlib
import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from library import console
from library.errors import UserError, suggest
from library.options.network import names_file

logger = logging.getLogger(__name__)

_LONGEST = 300  # letters of an error that are shown
LYCORIS = "lycoris.kohya"
_OURS = "networks.lora (with DoRA), networks.dylora, networks.lora_fa and networks.oft"
_PACKAGES = {"lycoris": "lycoris-lora"}  # modules -> what to install, where that has another name
_LYCORIS_READS = (
    *("algo", "preset", "conv_dim", "conv_alpha", "dropout", "rank_dropout", "module_dropout", "train_norm", "dora_wd"),
    *("constraint", "rescaled", "wd_on_output", "full_matrix", "bypass_mode", "rs_lora", "decompose_both", "factor"),
    *("unbalanced_factorization", "block_size", "use_scalar", "use_tucker", "train_t5xxl", "train_llm_adapter"),
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
    *("use_cp", "use_conv_cp", "disable_conv_cp", "constrain"),  # older names
)  # what its function create_network takes out of its keywords, in version 4.1.3; it passes over others in silence


def import_network_module(name: str | None, wanted_by: str = "--network_module") -> ModuleType:
    """The module of --network_module: a name to import, of a file in the current folder, too, or a path of one.

    UserError if it is missing, cannot be imported or is no network module; `wanted_by` begins its sentence.
    """
    if not name:
        raise UserError("no network to train: give --network_module one, such as networks.lora")
    try:
        with console.quiet_dependencies():
            module = _import_file(Path(name)) if names_file(name) else _import_named(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if names_file(name) or not name.startswith(missing) or missing in _PACKAGES:
            package = _PACKAGES.get(missing, missing)
            raise UserError(f"{wanted_by} {name} needs the package {missing}: pip install {package}") from error
        raise UserError(f"{wanted_by}: there is no module {name}, ours are {_OURS}") from error
    except Exception as error:  # whatever other people's raise
        if name.startswith("."):
            raise UserError(f"{wanted_by}: there is no module {name}, ours are {_OURS}") from error
        logger.warning("importing %s failed", name, exc_info=True)
        raise UserError(f"{wanted_by} {name} cannot be imported: {_named(error)}") from error
    if not inspect.isfunction(getattr(module, "create_network", None)):
        raise UserError(f"{wanted_by} {name} is no network module: it has no function create_network")
    return module


def _import_named(name: str) -> ModuleType:
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # at the end: a file of the user's hides no package
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    """The module in a file, which finds the files beside it."""
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = path.stem
    while name in sys.modules:  # of a package that the file has the name of
        name = f"_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


def check_arguments(module: ModuleType, keywords: Mapping[str, object]) -> None:
    """UserError for values in --network_args that LyCORIS would stumble over without saying which it knows. A name that
    it does not read may be one of a newer version, and is said.
    """
    if module.__name__ != LYCORIS:
        return
    for name in sorted(keywords.keys() - set(_LYCORIS_READS)):
        console.warn(f"--network_args: LyCORIS does not read {name}, it has no effect{suggest(name, _LYCORIS_READS)}")
    for name, known in (("algo", module.network_module_dict), ("preset", module.PRESET)):
        value = str(keywords.get(name) or "")
        found = value.lower() in known if name == "algo" else value in known or Path(value).is_file()
        if value and not found:
            close = suggest(value, known)
            raise UserError(f"--network_args: LyCORIS has no {name} {value}, only {', '.join(known)}{close}")


@contextlib.contextmanager
def called(
    name: str | None, what: str, flag: str = "--network_module", *, without_values: bool = False
) -> Iterator[None]:
    """While it lasts, `what` of the network module of this name is called and keeps off the console; see below."""
    with failing_as_mistake(failure(name, what, flag), without_values=without_values), console.quiet_dependencies():
        yield


def failure(name: str | None, what: str, flag: str = "--network_module") -> str:
    """How the sentence begins that says why `what` of a network module fails."""
    return f"{flag}: {what} of {name} fails"


@contextlib.contextmanager
def failing_as_mistake(sentence: str, *, without_values: bool = False) -> Iterator[None]:
    """What a network module raises is a UserError that begins with this sentence. On a model `without_values`, of which
    only the headers are read, it may raise the NotImplementedError of values that are missing.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever other people's raise
        if without_values and isinstance(error, RuntimeError) and "meta" in str(error).lower():
            raise NotImplementedError(str(error)) from error
        logger.warning("%s", sentence, exc_info=True)
        raise UserError(f"{sentence}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return _named(error) if isinstance(error, LookupError) or not text else text


def _named(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
