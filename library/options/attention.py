"""How attention is computed, and whether the U-Net is compiled."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option

BACKENDS = (
    "eager",
    "aot_eager",
    "inductor",
    "aot_ts_nvfuser",
    "nvprims_nvfuser",
    "cudagraphs",
    "ofi",
    "fx2trt",
    "onnxrt",
    "tensort",
    "ipex",
    "tvm",
)


@dataclass(frozen=True)
class AttentionOptions:
    """What makes the same computation faster, or smaller. Results differ in roundings only."""

    title: ClassVar[str] = "attention and compilation"

    sdpa: bool = option(False, "let torch choose how attention is computed, which it does without this flag, too")
    xformers: bool = option(
        False, "compute attention with xformers, which has to be installed; where it cannot run, as with --sdpa"
    )
    diffusers_xformers: bool = option(False, "the same as --xformers")
    mem_eff_attn: bool = option(
        False, "compute attention only in ways that never hold all of its weights at once; before --xformers"
    )
    torch_compile: bool = option(
        False, "compile the blocks of the U-Net: the first steps take minutes, the others are faster"
    )
    dynamo_backend: str = option("inductor", "what --torch_compile compiles with", metavar="NAME", choices=BACKENDS)

    @property
    def wanted(self) -> dict[str, str]:
        """The ways to compute attention that were asked for, the one to use first, and the flags that did."""
        ways = {
            "mem_eff_attn": "mem_eff_attn",
            "diffusers_xformers": "xformers",
            "xformers": "xformers",
            "sdpa": "sdpa",
        }
        return {way: f"--{name}" for name, way in ways.items() if getattr(self, name)}
