"""--torch_compile: the blocks that a U-Net is made of, compiled once for all sizes of pictures."""

import torch
from torch import Tensor, nn

from library import console
from library.errors import UserError
from library.options.attention import AttentionOptions

_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
_GONE = ("aot_ts_nvfuser", "nvprims_nvfuser", "ofi", "fx2trt")
_SPELLED = {"tensort": "tensorrt"}
_VERSIONS = 8  # of each block: with gradients and without, in training and not, one picture and several


def settle_backend(options: AttentionOptions, device: torch.device) -> str | None:
    """What to compile with, which is tried on this device; None to compile nothing. UserError if it does not work."""
    if not options.torch_compile:
        return None
    name = options.dynamo_backend
    if name in _GONE:
        console.notice(f"--dynamo_backend {name} is no longer a part of torch: compiling with inductor")
        name = "inductor"
    name = _SPELLED.get(name, name)
    numbers = torch.ones(8, device=device, requires_grad=True)
    try:
        with console.quiet_dependencies():
            torch.compile(_trial, backend=name, dynamic=True)(numbers).backward()
    except Exception as error:  # a compiler, a package or a driver that is missing, each in its own way
        raise UserError(
            f"--torch_compile does not work here with --dynamo_backend {options.dynamo_backend}, because "
            f"{_reason(error)}: {_advice(name, device)}"
        ) from error
    return name


def _trial(numbers: Tensor) -> Tensor:
    return (numbers * 2).relu().sum()


def _reason(error: BaseException) -> str:
    """The first line that its first cause says; torch's own error names that in an attribute."""
    while cause := error.__cause__ or getattr(error, "inner_exception", None):
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")


def _advice(backend: str, device: torch.device) -> str:
    if backend != "inductor":
        return "choose another one, or drop --torch_compile"
    need = "the package triton (on Windows triton-windows)" if device.type == "cuda" else "a C++ compiler"
    return f"install {need}, or drop --torch_compile"


def compile_blocks(unet: nn.Module, backend: str) -> int:
    """Have the blocks compiled when they are first used; no module and no tensor changes its name. To be called when
    networks are attached. Returns how many blocks there are.
    """
    blocks = [module for module in unet.modules() if type(module).__name__ in _BLOCKS]
    limit = _VERSIONS * len(blocks)  # beyond torch's own, 8 of all blocks, they would not be compiled, without a word
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, limit)
    for block in blocks:
        block.compile(backend=backend, dynamic=True, recompile_limit=limit)
    return len(blocks)
