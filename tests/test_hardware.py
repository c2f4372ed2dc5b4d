import pytest
import torch

from library.environment import Card
from library.errors import UserError
from library.training.device import hardware
from library.training.device.hardware import Hardware, judge, supports, usable_precision

CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
OLD = Card("GeForce GTX 1080", (6, 1), 560)
NEW = Card("GeForce RTX 5090", (12, 0), 580)
AMPERE = Card("GeForce RTX 3060", (8, 6), 580)


def machine(device="cuda", card=None, **others):
    return Hardware(device=device, torch_version="2.13.0", system="Linux", card=card, **others)


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 6), CU130, True),
        ((8, 9), CU130, True),  # machine code of the same major version, lower minor
        ((6, 1), CU130, False),
        ((7, 0), CU130, False),
        ((12, 1), CU130, True),
        ((13, 0), CU130, True),  # from intermediate code
        ((12, 0), ("sm_50", "sm_90"), False),
        ((10, 0), ("sm_90", "compute_90"), True),
        ((9, 0), ("sm_90a",), True),
        ((9, 1), ("sm_90a",), False),  # a letter ties code to one architecture
        ((10, 3), ("compute_100a",), False),
        ((12, 1), ("sm_120f",), False),
        ((8, 0), (), False),
    ],
)
def test_supports(capability, architectures, expected):
    assert supports(capability, architectures) is expected


def test_a_card_that_fits_is_not_mentioned():
    assert judge(machine(card=AMPERE, architectures=CU130, cuda_version="13.0")) is None
    assert judge(machine("cpu")) is None


def test_a_card_too_old_for_the_installed_torch_is_refused_with_the_command():
    with pytest.raises(UserError) as caught:
        judge(machine(card=OLD, architectures=CU130, cuda_version="13.0"))
    assert "GTX 1080 (compute capability 6.1" in str(caught.value)
    assert "pip install torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126" in str(caught.value)


def test_a_card_too_new_for_the_installed_torch_is_refused_with_the_command():
    with pytest.raises(UserError, match=r"torch==2\.13\.0\+cu130 --index-url \S+/cu130`"):
        judge(machine(card=NEW, architectures=("sm_80", "sm_90"), cuda_version="12.6"))


def test_a_card_beside_a_cpu_build_is_a_notice_with_the_command():
    notice = judge(machine("cpu", card=AMPERE))
    assert "RTX 3060 is not used" in notice
    assert "torch==2.13.0+cu130" in notice


def test_a_card_that_torch_cannot_open_is_a_notice_about_the_driver():
    notice = judge(machine("cpu", card=AMPERE._replace(driver=550), cuda_version="13.0"))
    assert "driver 550" in notice
    assert "torch==2.13.0+cu126" in notice


@pytest.mark.parametrize(
    ("wanted", "hardware_of", "precision", "noticed"),
    [
        ("no", machine("cpu"), "no", False),
        ("bf16", machine("cpu"), "bf16", False),
        ("fp16", machine("cpu"), "bf16", True),
        ("fp16", machine("mps"), "fp16", False),
        ("bf16", machine(card=AMPERE), "bf16", False),
        ("fp16", machine(card=AMPERE), "fp16", False),
    ],
)
def test_usable_precision(wanted, hardware_of, precision, noticed):
    chosen, notice = usable_precision(wanted, hardware_of)
    assert chosen == precision
    assert (notice is not None) is noticed


@pytest.mark.parametrize("device", [machine("mps", bf16=False), machine(card=OLD, bf16=False)])
def test_bf16_is_refused_where_fp16_would_be_another_training(device):
    with pytest.raises(UserError, match="use --mixed_precision fp16"):
        usable_precision("bf16", device)


def test_this_machine_is_probed_and_settled(monkeypatch):
    said = []
    monkeypatch.setattr(hardware.console, "notice", said.append)
    monkeypatch.setattr(hardware, "find_cards", lambda: [AMPERE])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.settle_precision("fp16", torch.device("cpu")) == "bf16"
    assert len(said) == 2


def test_a_card_hidden_on_purpose_is_not_mentioned(monkeypatch):
    monkeypatch.setattr(hardware, "find_cards", lambda: [AMPERE])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.probe(torch.device("cpu")).card is None
