"""Compiled blocks: once for all sizes, the same answer, the same names; and what cannot compile."""

from collections.abc import Iterator

import pytest
import torch

from library.errors import UserError
from library.options import AttentionOptions, NetworkOptions, OptimizerOptions
from library.training.device import compilation
from library.training.device.compilation import compile_blocks, settle_backend
from library.training.methods.network import NetworkMethod
from tests import tiny

CPU = torch.device("cpu")
SIZES = ((16, 16), (16, 8), (8, 24), (20, 12))


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was compiled in a test, and how often it may be."""
    limit = torch._dynamo.config.accumulated_recompile_limit
    yield
    torch._dynamo.reset()
    torch._dynamo.config.accumulated_recompile_limit = limit


def test_blocks_with_a_network_are_compiled_once_for_all_sizes():
    graphs: list[object] = []
    model = tiny.make_model()
    network = NetworkMethod(NetworkOptions("networks.lora"), OptimizerOptions()).build(model)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter.requires_grad_(), std=0.02)
    names = list(model.state_dict())

    def answers() -> tuple[list[torch.Tensor], list[int]]:
        found, counts = [], []
        for height, width in SIZES:
            latents = torch.linspace(-1, 1, 2 * 4 * height * width).reshape(2, 4, height, width)
            answer = model.denoise(latents, torch.tensor([1, 900]), {"encoder_hidden_states": torch.ones(2, 77, 64)})
            found += [answer.detach(), *torch.autograd.grad(answer.square().mean(), list(network.unet_parameters()))]
            counts.append(len(graphs))
        return found, counts

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    network.unet_parameters = lambda: (parameter for lora in network.unet_loras for parameter in lora.parameters())
    plain, _ = answers()
    blocks = compile_blocks(model.unet.down_blocks[0], counting)  # the others take as long
    compiled, counts = answers()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(plain, compiled, strict=True))
    assert 0 < counts[0] <= blocks
    assert counts[1] == counts[-1]  # the first two sizes have all that differs: square pictures, and others
    assert list(model.state_dict()) == names


def test_there_is_room_for_every_version_of_every_block(monkeypatch):
    limits = []
    model = tiny.make_model()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, recompile_limit, **_: limits.append(recompile_limit))
    blocks = compile_blocks(model.unet, "eager")
    assert limits == [8 * blocks] * blocks
    assert torch._dynamo.config.accumulated_recompile_limit >= 8 * blocks


def test_nothing_is_tried_without_the_flag(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    assert settle_backend(AttentionOptions(dynamo_backend="tvm"), CPU) is None


@pytest.mark.parametrize(("name", "used"), [("fx2trt", "inductor"), ("tensort", "tensorrt"), ("eager", "eager")])
def test_old_names(name, used, monkeypatch):
    tried, said = [], []
    monkeypatch.setattr(torch, "compile", lambda function, backend, **_: (tried.append(backend), function)[1])
    monkeypatch.setattr(compilation.console, "notice", said.append)
    assert settle_backend(AttentionOptions(torch_compile=True, dynamo_backend=name), CPU) == used
    assert tried == [used]
    assert bool(said) is (name == "fx2trt")


def test_a_backend_that_is_not_installed_is_one_sentence_before_weights_are_read(train, flags, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, torch_compile=True, dynamo_backend="tvm"))
    message = capsys.readouterr().err
    assert (
        "--torch_compile does not work here with --dynamo_backend tvm, because No module named 'tvm': choose" in message
    )
    assert "Traceback" not in message


def test_a_missing_compiler_is_named(monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(torch, "compile", lambda function, **_: fail)
    with pytest.raises(UserError, match=r"because Failed to find C compiler: install a C\+\+ compiler, or drop"):
        settle_backend(AttentionOptions(torch_compile=True), CPU)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_run_comes_out_as_without(train, flags, tmp_path, pictures, backend):
    """With checkpointing, accumulation, weights of 8 bits and pictures of two sizes."""
    folder = tmp_path / "pictures" / "1_x"
    for size in ((32, 32), (32, 48)):
        tiny.draw_pictures(folder, 2, size)
    common = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "enable_bucket": True}
    common |= {"mixed_precision": "bf16", "fp8_base": True, "train_data_dir": folder.parent, "max_train_steps": 3}
    common |= {"resolution": "48,48", "bucket_no_upscale": True, "bucket_reso_steps": 16, "min_bucket_reso": 16}
    losses = []
    for name, changes in (("plain", {}), ("compiled", {"torch_compile": True, "dynamo_backend": backend})):
        train(flags(tmp_path / name, logging_dir=tmp_path / f"{name}_log", **common, **changes))
        losses.append(list(tiny.scalars(tiny.read_log(tmp_path / f"{name}_log"), "loss/current").values()))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    plain, compiled = (tmp_path / name / "run.safetensors" for name in ("plain", "compiled"))
    assert tiny.largest_difference(plain, compiled) < 0.05  # names are the same, or this fails
