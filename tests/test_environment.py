import functools
import subprocess
import sys
from pathlib import Path

import pytest

from library import environment
from library.environment import Card, SetupError, Stamp, torch_build

UNREACHABLE = (
    "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)': /simple/torch/\n"
    "ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)\n"
    "ERROR: No matching distribution found for torch==2.13.0\n"
)


class FakeRun:
    """Records commands instead of running them; `venv` leaves a Python behind, and any command can be made to fail."""

    def __init__(self, venv: Path) -> None:
        self.venv, self.commands, self.failures = venv, [], {}

    def __call__(self, command):
        line = " ".join(map(str, command))
        self.commands.append(line)
        for word, stderr in self.failures.items():
            if word in line:
                return subprocess.CompletedProcess(command, 1, stderr=stderr)
        if "-m venv" in line:
            python = environment.venv_python(self.venv)
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        return subprocess.CompletedProcess(command, 0, stderr="")

    def installs(self) -> list[str]:
        return [command for command in self.commands if "pip install" in command]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with two requirements files, on a Linux machine without a card."""
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\n")
    (tmp_path / "requirements-dev.txt").write_text("-r requirements.txt\npytest\n")
    monkeypatch.setattr(environment.platform, "system", lambda: "Linux")
    monkeypatch.setattr(environment, "find_cards", list)
    return tmp_path


@pytest.fixture
def run(project):
    return FakeRun(project / ".venv")


def prepare(project, run, name="requirements.txt"):
    return environment.prepare(project / name, project / ".venv", run)


def test_first_setup_makes_the_venv_and_takes_torch_from_its_own_index(project, run):
    assert prepare(project, run) == environment.venv_python(project / ".venv")
    assert "-m venv --clear" in run.commands[0]
    torch, rest = run.installs()
    assert torch.endswith("--index-url https://download.pytorch.org/whl/cpu torch==2.13.0")
    assert "--no-deps" in torch
    assert rest.endswith(f"-r {project / 'requirements.txt'}")


def test_a_finished_venv_is_reused_without_running_anything(project, run):
    prepare(project, run)
    run.commands.clear()
    prepare(project, run)
    assert run.commands == []


def test_changed_requirements_are_installed_into_the_same_venv(project, run):
    prepare(project, run, "requirements-dev.txt")
    (project / "requirements.txt").write_text("torch==2.13.0\nnumpy\n")  # included by the other file
    run.commands.clear()
    prepare(project, run, "requirements-dev.txt")
    assert run.installs()
    assert not any("-m venv" in command for command in run.commands)


def test_both_requirements_files_can_be_finished(project, run):
    prepare(project, run)
    prepare(project, run, "requirements-dev.txt")
    run.commands.clear()
    prepare(project, run)
    prepare(project, run, "requirements-dev.txt")
    assert run.commands == []


def test_installing_changed_requirements_unfinishes_the_other_file(project, run):
    old = (project / "requirements.txt").read_text()
    prepare(project, run, "requirements-dev.txt")
    (project / "requirements.txt").write_text("torch==2.14.0\n")
    prepare(project, run)
    (project / "requirements.txt").write_text(old)
    assert not Stamp(project / ".venv").has(project / "requirements-dev.txt")


@pytest.mark.parametrize("error", [SetupError, KeyboardInterrupt])
def test_an_interrupted_installation_is_resumed(project, run, monkeypatch, error):
    prepare(project, run)
    (project / "requirements.txt").write_text("torch==2.13.0\nnumpy\n")

    def interrupted(command):
        if "-r" in command:
            raise error
        return run(command)

    with pytest.raises(error):
        prepare(project, interrupted)
    assert not Stamp(project / ".venv").has(project / "requirements.txt")
    run.commands.clear()
    prepare(project, run)
    assert run.installs()[-1].endswith("requirements.txt")
    assert not any("-m venv" in command for command in run.commands)


def test_a_venv_whose_python_does_not_start_is_made_anew(project, run):
    prepare(project, run)
    Stamp(project / ".venv").clear()
    run.commands.clear()
    run.failures["version_info"] = "bad interpreter"
    prepare(project, run)
    assert any("-m venv --clear" in command for command in run.commands)


def test_a_venv_without_pip_gets_it(project, run):
    prepare(project, run)
    Stamp(project / ".venv").clear()
    run.failures["import pip"] = "No module named pip"
    prepare(project, run)
    assert any(command.endswith("-m ensurepip") for command in run.commands)


def test_an_unreachable_wheel_index_leaves_torch_to_the_usual_one(project, run, capsys):
    run.failures["--index-url"] = UNREACHABLE
    prepare(project, run)
    assert "taking torch from pip's usual index" in capsys.readouterr().out
    assert Stamp(project / ".venv").has(project / "requirements.txt")


def test_no_venv_module(project, run, monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    with pytest.raises(SetupError, match=r"sudo apt install python3\.\d+-venv"):
        prepare(project, run)
    assert not (project / ".venv").exists()


def test_too_little_disk(project, run, monkeypatch):
    usage = environment.shutil.disk_usage(project)._replace(free=10**9)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SetupError, match=r"1\.0 GB free, but the packages need 4 GB"):
        prepare(project, run)
    assert run.commands == []


def test_a_failed_setup_is_one_sentence_and_status_2(project, run, monkeypatch, capsys):
    run.failures[" -r "] = UNREACHABLE
    monkeypatch.setattr(environment, "ROOT", project)
    monkeypatch.setattr(environment, "prepare", functools.partial(environment.prepare, venv=run.venv, run=run))
    assert environment.enter("requirements.txt", []) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(
        "error: requirements.txt could not be installed: the package index cannot be reached"
    )


@pytest.mark.parametrize(
    ("version", "bits", "system", "machine", "message"),
    [
        ((3, 10), 64, "Linux", "x86_64", "this is a 64-bit Python 3.10, but .* 3.11 to 3.14"),
        ((3, 15), 64, "Linux", "x86_64", "Python 3.15"),
        ((3, 12), 32, "Windows", "x86", "32-bit"),
        ((3, 12), 64, "Darwin", "x86_64", "Intel Macs"),
    ],
)
def test_python_without_wheels(version, bits, system, machine, message):
    with pytest.raises(SetupError, match=message):
        environment.check_python(version, bits, system, machine)


def test_python_with_wheels():
    environment.check_python((3, 11), 64, "Linux", "aarch64")
    environment.check_python((3, 14), 64, "Darwin", "arm64")


def test_cards_are_read_from_nvidia_smi():
    text = "580.159.04, 9.0, NVIDIA H100 80GB HBM3\n535.54, 7.5, Quadro RTX 4000\nNVIDIA-SMI has failed\n"
    assert environment.parse_cards(text) == [
        Card("NVIDIA H100 80GB HBM3", (9, 0), 580),
        Card("Quadro RTX 4000", (7, 5), 535),
    ]


@pytest.mark.parametrize(
    ("system", "cards", "build"),
    [
        ("Darwin", [], None),
        ("Linux", [], "cpu"),
        ("Windows", [], "cpu"),
        ("Linux", [Card("RTX 3060", (8, 6), 580)], "cu130"),
        ("Windows", [Card("RTX 3060", (8, 6), 560)], "cu126"),  # an older driver
        ("Linux", [Card("GTX 1080", (6, 1), 580)], "cu126"),
        ("Linux", [Card("RTX 5090", (12, 0), 570)], "cu130"),  # needs a newer driver whatever is installed
        ("Linux", [Card("GTX 1080", (6, 1), 580), Card("RTX 4090", (8, 9), 580)], "cu130"),
    ],
)
def test_torch_build(system, cards, build):
    assert torch_build(system, cards) == build


@pytest.mark.parametrize(
    ("stderr", "sentence"),
    [
        (UNREACHABLE, "the package index cannot be reached"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for toml==9", "the package index has no toml==9 for Python 3"),
        ("a warning\nERROR: Cannot install a and b\nhint: something\n", "Cannot install a and b"),
        ("", "it gave no reason"),
    ],
)
def test_explain(stderr, sentence):
    assert environment.explain(stderr).startswith(sentence)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            "  Downloading torch-2.13.0+cpu-cp311-cp311-linux.whl (191.8 MB)\n",
            "  downloading torch 2.13.0+cpu (191.8 MB)",
        ),
        ("  Downloading h11-0.16.0-py3-none-any.whl (37 kB)\n", None),
        ("Installing collected packages: sympy, torch\n", "  unpacking 2 packages"),
        ("Requirement already satisfied: torch==2.13.0 in ./.venv\n", None),
    ],
)
def test_progress(line, shown):
    assert environment.progress(line) == shown


def test_a_command_keeps_its_stderr_and_shows_its_progress(capsys):
    code = "import sys; print('Installing collected packages: a'); print('ERROR: no', file=sys.stderr); sys.exit(7)"
    done = environment.run_command([sys.executable, "-c", code])
    assert (done.returncode, done.stderr.strip()) == (7, "ERROR: no")
    assert capsys.readouterr().out == "  unpacking 1 packages\n"


@pytest.mark.parametrize(("code", "status"), [("pass", 0), ("raise SystemExit(3)", 3)])
def test_hand_over_passes_the_exit_status_on(code, status):
    assert environment.hand_over([sys.executable, "-c", code]) == status


def test_the_pinned_torch_is_where_the_setup_looks_for_it():
    requirements = (environment.ROOT / "requirements.txt").read_text()
    assert any(line.startswith("torch==") for line in requirements.splitlines())
