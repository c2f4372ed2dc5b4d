"""Several processes: what they share, how long they wait for each other, and how they end together."""

import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from library.options import DistributedOptions
from library.training.device import accelerator, engines
from library.training.device.accelerator import connection
from library.training.methods.base import ParameterGroup
from tests.fork_server import Ended
from tests.processes import run
from tests.tiny import largest_difference, stored

TORCHRUN = Path(sys.executable).with_name("torchrun")
TWO = (TORCHRUN, "--standalone", "--nproc_per_node", "2", "-m", "tests.distributed")
# steps nearly proportional to gradients, so that runs that should agree can be compared number by number
PROPORTIONAL = {"learning_rate": 1, "optimizer_args": ("eps=1", "weight_decay=0", "betas=0.5,0.5")}
COMMON = {"max_grad_norm": 0.01, "train_batch_size": 1, "gradient_accumulation_steps": 2, **PROPORTIONAL}
Start = Callable[..., Ended]


@pytest.fixture(scope="module")
def two(fork_server, flags, tmp_path_factory) -> Start:
    """`two(folder, how, **changes)`: a run of two processes as tests/distributed.py changes it, previews and all."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red circle --w 32 --h 32 --s 2 --d 1")

    def start(folder: Path, *how: str, environment: dict[str, str] | None = None, **changes: object):
        changes = {"sample_prompts": prompts, "sample_every_n_steps": 2, "save_every_n_steps": 2, **COMMON, **changes}
        return fork_server.run(flags(folder, **changes), processes=2, how=how, environment=environment)

    return start


@pytest.fixture(scope="module")
def plain_run(two, tmp_path_factory) -> tuple[Path, Ended]:
    """Two processes with a copy of the model each, five seconds of patience, and slow work of the first one alone."""
    folder = tmp_path_factory.mktemp("plain")
    how = ("impatient", "slow_preview", "slow_cache", "telling")
    return folder, two(
        folder,
        *how,
        sample_every_n_steps=4,
        ddp_timeout=1,
        ddp_gradient_as_bucket_view=True,
        ddp_static_graph=True,  # left out
    )


def told(ended: Ended, what: str) -> Counter[str]:
    """How often it was told; lines of two processes may be mixed."""
    return Counter(re.findall(rf"{what} <(\w+)>", ended.said))


def errors(said: str) -> list[str]:
    return sorted(re.findall(r"error(?: \(process \d\))?: [^\r\n]*", said))


def test_no_process_gives_up_while_another_one_caches_or_paints(plain_run):
    folder, ended = plain_run
    assert ended.status == 0, ended.said
    names = ["run-step00000002.safetensors", "run-step00000004.safetensors", "run.safetensors", "sample"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert len(list((folder / "sample").iterdir())) == 1


def test_processes_have_equal_weights_after_every_step_and_noise_of_their_own(plain_run):
    weights, noise = told(plain_run[1], "WEIGHTS"), told(plain_run[1], "NOISE")
    assert len(weights) == 4
    assert set(weights.values()) == {2}
    assert set(noise.values()) == {1}


@pytest.mark.slow
def test_bf16_weights_are_rounded_alike(two, tmp_path):
    changes = {"mixed_precision": "bf16", "full_bf16": True, "sample_every_n_steps": None, "save_precision": "float"}
    result = two(tmp_path / "two", "telling", **changes, optimizer_type="AdamWScheduleFree", optimizer_args=None)
    assert result.status == 0, result.said
    weights = told(result, "WEIGHTS")
    assert len(weights) == 4
    assert set(weights.values()) == {2}


@pytest.mark.slow
def test_weights_that_move_within_the_backward_pass_need_one_process(two, tmp_path):
    result = two(tmp_path, "impatient", gradient_accumulation_steps=1, fused_backward_pass=True)
    assert result.status == 2
    assert "--fused_backward_pass leaves no time for 2 processes to exchange gradients" in result.said


def test_fsdp_writes_the_files_of_plain_processes(two, plain_run, tmp_path):
    fsdp = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
    }
    ended = two(tmp_path, "on_cpu", "spread", environment=fsdp, save_state=True, no_rehearsal=None)
    assert ended.status == 0, ended.said
    assert told(ended, "SPREAD") == {"fsdp": 2}
    assert "unet: weights changed by" in ended.said
    for name in ("run-step00000002.safetensors", "run.safetensors"):
        assert max(tensor.abs().max() for key, tensor in load_file(tmp_path / name).items() if "up" in key) > 1e-3
        assert largest_difference(tmp_path / name, plain_run[0] / name) < 1e-6
    assert len(list((tmp_path / "sample").iterdir())) == 2

    state = tmp_path / "run-step00000002-state"
    ended = two(tmp_path / "resumed", "on_cpu", "spread", environment=fsdp, resume=state, sample_every_n_steps=None)
    assert ended.status == 0, ended.said
    assert f"going on after step 2 with {state}" in ended.said
    assert stored(tmp_path / "resumed" / "run.safetensors") == stored(tmp_path / "run.safetensors")


def test_a_part_of_a_state_that_cannot_be_written_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "engine", lambda accelerator: "fsdp")
    monkeypatch.setattr(engines, "_prepared", lambda accelerator: (nn.Linear(1, 1), None))
    monkeypatch.setattr(engines, "get_state_dict", lambda *arguments, options: ({"weight": torch.ones(1)}, {}))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"/file/engine cannot be written: (Not a directory|File exists)$"):
        engines.save_engine(None, tmp_path / "file" / "engine")


def test_a_mistake_in_one_process_ends_the_other_one_in_a_sentence(two, tmp_path):
    ended = two(tmp_path, "mistaken", sample_every_n_steps=None)
    assert ended.status
    other, own = errors(ended.said)
    assert own == "error: something is wrong here"
    assert other.startswith("error (process 1): another process of this run has ended, ")
    assert "[rank" not in ended.said  # as torch begins the lines of a process's traceback
    assert not list(tmp_path.iterdir())


def test_a_state_that_cannot_be_written_leaves_no_process_waiting(two, tmp_path):
    ended = two(tmp_path, "out_of_room", sample_every_n_steps=None, save_state=True, no_rehearsal=None)
    assert ended.status == 0, ended.said
    assert ended.said.count("there is no room: the training goes on without it") == 1
    stems = ("run-step00000002", "run-step00000004", "run")
    names = {f"{stem}.safetensors" for stem in stems} | {f"{stem}-state" for stem in stems[1:]}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_killed_process_ends_the_other_one_at_once(flags, tmp_path):
    """As a user starts them."""
    started = time.monotonic()
    result = run([*TWO, "killed", "--", *flags(tmp_path, **COMMON)], 200, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    assert result.returncode
    (message,) = errors(result.stderr)
    assert message.startswith("error: another process of this run has ended, ")
    assert "[rank" not in result.stderr
    assert time.monotonic() - started < 60  # the connection for gradients has a limit of half an hour


# Options


def test_processes_wait_as_long_as_is_allowed_and_meet_without_nccl_on_windows(monkeypatch):
    monkeypatch.setenv("USE_LIBUV", "1")
    assert connection(DistributedOptions(), "Linux", 2) == {}
    assert connection(DistributedOptions(ddp_timeout=3), "Linux", 2) == {"timeout": timedelta(minutes=3)}
    assert os.environ["USE_LIBUV"] == "1"
    assert connection(DistributedOptions(), "Windows", 2) == {"backend": "gloo"}
    assert os.environ["USE_LIBUV"] == "0"
    assert connection(DistributedOptions(ddp_timeout=3), "Windows", 1) == {}


@pytest.mark.parametrize("flag", ["ddp_gradient_as_bucket_view", "ddp_static_graph"])
def test_ddp_flags_reach_ddp(train, flags, tmp_path, monkeypatch, flag):
    asked = []
    keywords = accelerator.DistributedDataParallelKwargs
    monkeypatch.setattr(
        accelerator, "DistributedDataParallelKwargs", lambda **given: (asked.append(given), keywords(**given))[1]
    )
    train(flags(tmp_path, max_train_steps=1))
    train(flags(tmp_path, max_train_steps=1, **{flag: True}))
    name = flag.removeprefix("ddp_")
    train(flags(tmp_path, max_train_steps=1, gradient_accumulation_steps=2, **{flag: True}))
    assert [given[name] for given in asked] == [False, True, flag != "ddp_static_graph"]


def test_accumulation_is_the_flag_s_alone(train, flags, tmp_path, monkeypatch):
    """`accelerate launch` has one of its own, by which accelerate divides every loss."""
    train(flags(tmp_path / "a", **PROPORTIONAL, max_train_steps=1))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(flags(tmp_path / "b", **PROPORTIONAL, max_train_steps=1))
    assert largest_difference(tmp_path / "a" / "run.safetensors", tmp_path / "b" / "run.safetensors") == 0


def test_fsdp_computes_in_mixed_precision_as_the_others_do():
    class Spread:
        distributed_type, num_processes = DistributedType.FSDP, 2
        autocast = staticmethod(lambda: torch.autocast("cpu", torch.bfloat16))
        prepare = staticmethod(lambda *things: things)

    step = nn.Linear(2, 2)
    root, *_ = engines.prepare(Spread(), step, torch.optim.SGD(step.parameters()), [ParameterGroup("", [], 1.0)])
    assert root(torch.ones(2, 2)).dtype == torch.bfloat16


# DeepSpeed


def test_deepspeed_flags_are_arguments_of_the_plugin():
    plain = engines.deepspeed_arguments(DistributedOptions(deepspeed=True), None)
    assert plain == {
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_stage": 2,
        "offload_optimizer_device": "none",
        "offload_optimizer_nvme_path": None,
        "offload_param_device": "none",
        "offload_param_nvme_path": None,
        "zero3_init_flag": False,
        "zero3_save_16bit_model": False,
    }
    options = DistributedOptions(
        deepspeed=True,
        zero_stage=3,
        offload_optimizer_device="cpu",
        offload_param_device="nvme",
        offload_param_nvme_path="/disk",
        zero3_init_flag=True,
        zero3_save_16bit_model=True,
    )
    assert engines.deepspeed_arguments(options, 0.5) == plain | {
        "gradient_clipping": 0.5,
        "zero_stage": 3,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "nvme",
        "offload_param_nvme_path": "/disk",
        "zero3_init_flag": True,
        "zero3_save_16bit_model": True,
    }


def test_fp16_master_weights_are_deepspeed_s_own():
    options = DistributedOptions(deepspeed=True, offload_optimizer_device="cpu", fp16_master_weights_and_gradients=True)
    assert engines.deepspeed_changes(options, "fp16")["fp16"]["fp16_master_weights_and_gradients"] is True
    assert "fp16" not in engines.deepspeed_changes(DistributedOptions(deepspeed=True), "fp16")
    with pytest.raises(UserError, match="mixed_precision fp16 only"):
        engines.deepspeed_changes(options, "bf16")


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"offload_optimizer_device": "nvme"}, "give it as --offload_optimizer_nvme_path"),
        ({"offload_param_nvme_path": "/disk", "zero_stage": 3}, "only used with --offload_param_device nvme"),
        ({"offload_param_device": "cpu"}, "use --zero_stage 3"),
        ({"offload_optimizer_device": "cpu", "zero_stage": 1}, "needs --zero_stage 2 or 3"),
        ({"fp16_master_weights_and_gradients": True}, "--offload_optimizer_device cpu only"),
    ],
)
def test_deepspeed_flags_that_contradict_each_other(wrong, remedy):
    DistributedOptions(**wrong)  # without --deepspeed nobody asks
    with pytest.raises(UserError, match=remedy):
        DistributedOptions(deepspeed=True, **wrong)


def test_deepspeed_is_missed_in_one_sentence(train, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, deepspeed=True))
    assert "error: DeepSpeed is not installed: pip install deepspeed" in capsys.readouterr().err


def test_the_first_version_of_fsdp_is_refused(train, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path))
    assert "--fsdp_version 2" in capsys.readouterr().err
