"""Models in ONNX, opened by onnxruntime on the device that is there."""

from pathlib import Path
from typing import TYPE_CHECKING

from library.console import notice, quiet_dependencies
from library.errors import UserError, suggest

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_SUFFIX = "ExecutionProvider"
# float32 as the CPU has it, and no algorithm that is chosen by how fast it was: the same numbers in every run
_EXACT = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
_CPU, _CUDA = f"CPU{_SUFFIX}", f"CUDA{_SUFFIX}"


def open_session(path: Path, provider: str | None = None) -> "InferenceSession":
    """The model in a file, to be run by the named provider, else by CUDA if that works and else by the CPU. UserError
    if it is no model, or this onnxruntime has no such provider.
    """
    with quiet_dependencies():
        import onnxruntime

        there = onnxruntime.get_available_providers()
    wanted = _wanted(provider, there)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        with quiet_dependencies():  # a provider that fails prints why, and the CPU takes its place
            if wanted == _CUDA and hasattr(onnxruntime, "preload_dlls"):
                onnxruntime.preload_dlls()
            providers = [(wanted, _EXACT if wanted == _CUDA else {}), *([_CPU] if wanted != _CPU else [])]
            session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime's have no type in common
        raise UserError(
            f"{path}: this model cannot be read, it is damaged or no ONNX model: {reason(error)}"
        ) from error
    if session.get_providers()[0] != wanted:
        failed = wanted.removesuffix(_SUFFIX)
        if provider is not None:
            raise UserError(f"--provider: {failed} does not work on this machine, leave it out for the CPU")
        notice(f"this onnxruntime is built for {failed}, which does not work on this machine: the CPU is used")
    return session


def reason(error: Exception) -> str:
    """What onnxruntime says of a failure, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _wanted(provider: str | None, there: list[str]) -> str:
    """The full name of a provider. UserError if this onnxruntime does not have it."""
    if provider is None:
        return _CUDA if _CUDA in there else _CPU
    names = {name.removesuffix(_SUFFIX).lower(): name for name in there}
    short = provider.lower().removesuffix(_SUFFIX.lower())
    if short not in names:
        hint = "; the package onnxruntime-gpu has it" if short == "cuda" else suggest(short, names)
        raise UserError(f"--provider: this onnxruntime has no {provider}, only {', '.join(names)}{hint}")
    return names[short]
