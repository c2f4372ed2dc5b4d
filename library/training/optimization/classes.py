"""Classes that flags name, from packages that may be missing or broken."""

import importlib
from typing import Any

from library.console import quiet_dependencies
from library.errors import UserError, suggest


def import_class(flag: str, module: str, name: str, package: str = "", *, listed: bool = False) -> Any:
    """What a `module` has under that name; `flag` is written with its value. `package`: what pip calls it, if not as
    the module; `listed`: it was not the user who wrote the names.

    UserError if there is none, or if its package is missing or does not work.
    """
    package, source = package or module.partition(".")[0], None
    try:
        with quiet_dependencies():
            source = importlib.import_module(module)
            return getattr(source, name)
    except ModuleNotFoundError as error:
        itself = module.startswith(error.name or module)  # rather than something it needs
        if itself and not listed:
            raise UserError(
                f"{flag}: there is no module {error.name or module}: look at the spelling, or install its package"
            ) from error
        package = package if itself else error.name
        raise UserError(f"{flag} needs the package {package}: pip install {package}") from error
    except (Exception, SystemExit) as error:  # a module may do anything while it is imported
        if isinstance(error, AttributeError) and source is not None and not listed:
            raise UserError(f"{flag}: {module} has no {name}{suggest(name, dir(source))}") from error
        raise UserError(
            f"{flag}: the installed {package} does not work ({reason(error)}): pip install --upgrade {package}"
        ) from error


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
