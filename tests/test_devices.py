"""Where tools compute."""

from types import SimpleNamespace

import pytest
import torch

from library.devices import fastest_device


@pytest.mark.parametrize(
    ("there", "variables", "device"),
    [
        (False, {}, "cpu"),
        (True, {}, "cuda:0"),
        (True, {"LOCAL_RANK": "1"}, "cuda:1"),
        (True, {"ACCELERATE_USE_CPU": "true"}, "cpu"),
    ],
)
def test_the_fastest_device_is_this_process_own(monkeypatch, there, variables, device):
    for name in ("LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="cuda"))
    assert fastest_device() == torch.device(device)
