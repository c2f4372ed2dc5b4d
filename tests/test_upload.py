"""Uploads to the hub and states from it, against a hub on this machine."""

import re
import threading
import time
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import pytest

from library.errors import UserError
from library.options import HubOptions
from library.training.hub import StateAddress, check_hub, download_state, parse_address, why_not, without_secrets
from library.training.saving import Saver
from library.training.upload import Uploader
from tests.hub_stand_in import LARGE, TOKEN, ask, hub_stand_in
from tests.processes import python
from tests.tiny import read_log

REPO = "me/my-lora"


@pytest.fixture
def hub(monkeypatch, tmp_path, fresh_console):
    """A hub that huggingface_hub asks, with no login on this machine and no waiting between attempts."""
    with hub_stand_in() as hub:
        ask(monkeypatch, hub.url, tmp_path)
        yield hub


def options(**changes: object) -> HubOptions:
    return HubOptions(**{"huggingface_repo_id": REPO, "huggingface_token": TOKEN} | changes)


def make_model(folder: Path, name: str = "run.safetensors") -> Path:
    path = folder / name
    path.write_bytes(name.encode() * LARGE)
    return path


def make_state(folder: Path, name: str = "run-state") -> Path:
    state = folder / name
    (state / "parts").mkdir(parents=True)
    (state / "weights.pt").write_bytes(b"w" * 2 * LARGE)
    (state / "parts" / "optimizer.pt").write_bytes(b"o" * LARGE)
    (state / "state.json").write_text("{}")
    return state


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- uploads ---


@pytest.mark.parametrize(("visibility", "private"), [(None, True), ("private", True), ("public", False)])
def test_a_repository_is_made_and_a_model_uploaded(hub, tmp_path, visibility, private):
    model = make_model(tmp_path)
    Uploader(options(huggingface_repo_visibility=visibility)).upload(model)
    assert hub[REPO].private is private
    assert hub[REPO].files == {"run.safetensors": model.read_bytes()}


def test_an_existing_repository_is_used_as_it_is(hub, tmp_path):
    Uploader(options(huggingface_repo_visibility="public")).upload(make_model(tmp_path, "a"))
    uploader = Uploader(options(huggingface_path_in_repo="/loras/new/"))
    uploader.upload(make_model(tmp_path, "b"))
    uploader.upload(make_model(tmp_path, "c"))
    assert not hub[REPO].private
    assert hub[REPO].files.keys() == {"a", "loras/new/b", "loras/new/c"}
    assert hub.requests.count("POST /api/repos/create") == 2


def test_other_kinds_of_repositories(hub, tmp_path):
    Uploader(options(huggingface_repo_type="dataset")).upload(make_model(tmp_path))
    assert hub.repositories["datasets", REPO].files.keys() == {"run.safetensors"}


def test_a_state_is_one_commit_and_comes_back_byte_for_byte(hub, tmp_path):
    state = make_state(tmp_path)
    uploader = Uploader(options(huggingface_path_in_repo="runs [1]", save_state_to_huggingface=True))
    uploader.upload(make_model(tmp_path))
    uploader.upload_state(state)
    steps = [len(files) for _, files in hub[REPO].commits]
    assert steps == [0, 1, 4]

    name = f"{REPO}/runs [1]/run-state"
    for address in (name, f"{name}:main", f"{name}:{hub[REPO].commits[-1][0]}:model"):
        found = download_state(address, options(), tmp_path / "here")
        assert contents(found) == contents(state)
    assert not list((tmp_path / "here").rglob("run.safetensors"))


def test_large_files_go_to_the_newer_store_in_one_commit_too(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = tmp_path / "store"
    state = make_state(tmp_path)
    Uploader(options(save_state_to_huggingface=True)).upload_state(state)
    files = {f"run-state/{name}": data for name, data in contents(state).items()}
    stored = {name: sha256(data).hexdigest().encode() if len(data) >= LARGE else data for name, data in files.items()}
    assert [committed for _, committed in hub[REPO].commits] == [{}, stored]


def test_states_stay_here_unless_they_are_asked_for(hub, tmp_path):
    Uploader(options()).upload_state(make_state(tmp_path))
    assert hub.requests == []


def test_nothing_is_uploaded_without_a_repository_or_by_further_processes(hub, tmp_path, monkeypatch):
    Uploader(HubOptions()).upload(make_model(tmp_path))
    monkeypatch.setenv("RANK", "1")
    Uploader(options()).upload(make_model(tmp_path))
    assert hub.requests == []


@pytest.mark.parametrize(("changes", "processes"), [({"async_upload": True}, 1), ({}, 2)])
def test_training_goes_on_during_an_upload(hub, tmp_path, changes, processes):
    hub.open.clear()
    uploader = Uploader(options(**changes), processes)
    start = time.monotonic()
    for name in "abc":
        uploader.upload(make_model(tmp_path, name))
    assert time.monotonic() - start < 10  # commits wait for longer
    assert not hub.repositories or not hub[REPO].files
    hub.open.set()
    uploader.finish()
    assert hub[REPO].files.keys() == {"a", "b", "c"}


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (500, r"the hub answers with an error \(500: not now, Bearer \*\*\*\)"),
        (401, "the hub does not accept the access token"),
        (403, "the access token does not allow it"),
    ],
)
def test_a_hub_that_refuses_costs_one_warning_and_gets_all_later(hub, tmp_path, capsys, status, said):
    uploader = Uploader(options())
    hub.answer = status
    uploader.upload(make_model(tmp_path, "a"))
    uploader.upload(make_model(tmp_path, "b"))
    message = capsys.readouterr().err
    expected = rf"warning: \S+/{{}} was not uploaded to {REPO}: {said}; it is tried again after the next save\n"
    assert re.fullmatch(expected.format("a") + expected.format("b"), message), message
    assert TOKEN not in message
    hub.answer = None
    uploader.upload(make_model(tmp_path, "c"))
    assert hub[REPO].files.keys() == {"a", "b", "c"}
    capsys.readouterr()
    uploader.finish()
    assert capsys.readouterr().err == ""


def test_a_hub_that_fails_during_a_run_is_tried_again(hub, tmp_path, capsys):
    uploader = Uploader(options())
    uploader.upload(make_model(tmp_path, "a"))
    hub.answer = 503
    uploader.upload(make_model(tmp_path, "b"))
    assert hub.requests.count(f"POST /api/models/{REPO}/preupload/main") == 1 + 6  # the library's own patience
    uploader.finish()
    assert f"not uploaded to {REPO}: {tmp_path / 'b'}\n" in capsys.readouterr().err
    hub.answer = None
    uploader.finish()
    assert hub[REPO].files.keys() == {"a", "b"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_hub_at_all(tmp_path, capsys, monkeypatch, fresh_console, asynchronous):
    ask(monkeypatch, "http://127.0.0.1:9", tmp_path)
    uploader = Uploader(options(async_upload=asynchronous))
    uploader.upload(make_model(tmp_path))
    uploader.finish()
    assert "the hub cannot be reached" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"^--resume: x of {REPO} cannot be downloaded: the hub cannot be reached$"):
        download_state(f"{REPO}/x", options())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_removed_before_it_is_uploaded_is_let_go(hub, tmp_path, capsys, asynchronous):
    uploader = Uploader(options(async_upload=asynchronous, save_state_to_huggingface=True))
    hub.answer = None if asynchronous else 500
    hub.open.clear()
    uploader.upload(make_model(tmp_path, "first"))
    state = make_state(tmp_path)
    uploader.upload_state(state)
    (state / "weights.pt").unlink()
    hub.answer = None
    hub.open.set()
    uploader.upload(make_model(tmp_path, "last"))
    uploader.finish()
    assert hub[REPO].files.keys() == {"first", "last"}  # nothing of a state that is no longer whole
    assert f"{state} was removed before it was uploaded" in capsys.readouterr().err


def test_the_reason_is_that_of_the_file_that_failed():
    error = RuntimeError("Error while uploading one of them")
    error.__cause__ = ConnectionError()
    assert why_not(error, None) == "the hub cannot be reached"


def test_a_file_that_is_not_there_is_a_warning(hub, tmp_path, capsys):
    Uploader(options()).upload(tmp_path / "gone")
    assert "gone was removed before it was uploaded" in capsys.readouterr().err


def test_files_are_read_by_the_thread_that_uploads_and_as_they_are_then(hub, tmp_path, monkeypatch):
    readers = set()

    class Reading(huggingface_hub.CommitOperationAdd):
        def __post_init__(self):
            readers.add(threading.current_thread().name)
            super().__post_init__()

    monkeypatch.setattr(huggingface_hub, "CommitOperationAdd", Reading)
    uploader = Uploader(options(async_upload=True))
    hub.open.clear()
    uploader.upload(make_model(tmp_path, "a"))
    uploader.upload(make_model(tmp_path, "b"))
    (tmp_path / "b").write_bytes(b"new" * LARGE)
    hub.open.set()
    uploader.finish()
    assert hub[REPO].files["b"] == b"new" * LARGE
    assert readers == {"upload"}


def test_a_hub_that_is_down_is_not_asked_again_for_all_that_waits(hub, tmp_path, capsys):
    uploader = Uploader(options(async_upload=True))
    uploader.upload(make_model(tmp_path, "0"))
    uploader.finish()
    hub.open.clear()
    for name in "0123456789":
        uploader.upload(make_model(tmp_path, f"new {name}"))
    hub.answer = 500
    hub.open.set()
    uploader.finish()
    # after the one that worked: that on its way, the first of those that waited, and one at the end, six times each
    assert sum("preupload" in request for request in hub.requests) <= 1 + 6 + 6 + 6
    assert "not uploaded to me/my-lora: " in capsys.readouterr().err
    hub.answer = None
    uploader.upload(make_model(tmp_path, "more"))
    uploader.finish()
    assert len(hub[REPO].files) == 12


# --- states from the hub ---


def test_addresses():
    assert parse_address("a/b/c") == StateAddress("a/b", "c", None, "model")
    assert parse_address("a/b/c/d-state/:v1:dataset") == StateAddress("a/b", "c/d-state", "v1", "dataset")
    assert parse_address("a/b/c::space") == StateAddress("a/b", "c", None, "space")


@pytest.mark.parametrize("text", ["", "a", "a/b", "a/b/", "a b/c/d", "a/b/c:main:model:x", "/tmp/a/b", "a:main"])
def test_malformed_addresses(text):
    with pytest.raises(UserError, match="is no state of the hub, which is written as owner/name/folder"):
        parse_address(text)


def test_states_that_cannot_be_had(hub, tmp_path):
    uploader = Uploader(options(save_state_to_huggingface=True, huggingface_path_in_repo="runs"))
    uploader.upload_state(make_state(tmp_path))

    def said(name: str, **changes: object) -> str:
        with pytest.raises(UserError) as caught:
            download_state(name, options(**changes))
        return str(caught.value)

    near = "has no folder runs/run-stat, did you mean runs/run-state?"
    assert said(f"{REPO}/runs/run-stat") == f"--resume: {REPO} {near}"
    assert said(f"{REPO}/runs/run-state:v2") == f"--resume: {REPO} has no revision v2"
    nothing = "there is no such repository, or the access token does not open it"
    assert said("me/other/x") == f"--resume: x of me/other cannot be downloaded: {nothing}"
    assert said(f"{REPO}/runs/run-state", huggingface_token=None).endswith(nothing)
    assert "choose model, dataset, space, did you mean model?" in said(f"{REPO}/x:main:modell")
    hub.answer = 500
    assert "the hub answers with an error (500" in said(f"{REPO}/runs/run-state")


# --- flags ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"huggingface_repo_id": "my-lora"}, "my-lora is not the name of a repository, which is owner/name"),
        ({"huggingface_repo_id": "https://hub/me/it"}, "is not the name of a repository"),
        ({"huggingface_token": None}, "nothing can be uploaded to me/my-lora without an access token"),
        ({"huggingface_repo_id": None, "save_state_to_huggingface": True}, "add --huggingface_repo_id"),
        ({"huggingface_repo_id": None, "resume_from_huggingface": True}, "name the state with --resume owner/name"),
    ],
)
def test_flags_that_do_not_fit(hub, changes, said):
    with pytest.raises(UserError, match=said):
        check_hub(options(**changes), None, saves_states=True)


def test_a_login_or_the_environment_will_do_for_a_token(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_hub(options(huggingface_token=None), None, saves_states=True)
    Uploader(options(huggingface_token="")).upload(make_model(tmp_path))
    assert hub[REPO].files.keys() == {"run.safetensors"}


def test_a_token_is_not_needed_where_nothing_is_uploaded(hub):
    check_hub(HubOptions(), None, saves_states=False)
    check_hub(HubOptions(resume_from_huggingface=True), "a/b/c", saves_states=False)


def test_flags_without_effect_are_said(hub, capsys):
    check_hub(HubOptions(async_upload=True, huggingface_path_in_repo=""), None, saves_states=False)
    check_hub(options(save_state_to_huggingface=True, huggingface_repo_visibility="pubilc"), None, saves_states=False)
    said = capsys.readouterr().err
    assert "--async_upload has no effect" in said
    assert "path_in_repo" not in said
    assert "pubilc is neither public nor private, so a new repository is private" in said
    assert "--save_state_to_huggingface has no effect" in said


@pytest.mark.parametrize(
    "changes",
    [{"huggingface_token": "hf_a b"}, {"huggingface_path_in_repo": "a/../b"}, {"huggingface_repo_type": "modell"}],
)
def test_values_that_cannot_be(changes):
    with pytest.raises(UserError) as caught:
        options(**changes)
    assert "hf_a" not in str(caught.value)


# --- the token ---


def test_no_token_is_in_messages(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "the one of the environment")
    assert without_secrets(f"a {TOKEN} b\nhush", "hush") == "a *** b ***"
    assert without_secrets("x the one of the environment hf_Other", None) == "x *** ***"


# --- whole runs ---


def test_a_run_uploads_what_it_saves_and_tells_nobody_the_token(hub, tmp_path, flags, train, capsys):
    changes = {"save_every_n_steps": 2, "logging_dir": tmp_path / "logs", "huggingface_path_in_repo": "loras"}
    words = flags(tmp_path / "out", huggingface_repo_id=REPO, huggingface_token=TOKEN, async_upload=True, **changes)
    train(words)
    written = contents(tmp_path / "out")
    models = {f"loras/{name}": data for name, data in written.items() if name.endswith(".safetensors")}
    assert models.keys() == {f"loras/run{end}.safetensors" for end in ("", "-step00000002", "-step00000004")}
    assert hub[REPO].files == models
    everything = [*written.values(), *contents(tmp_path / "logs").values(), "".join(capsys.readouterr()).encode()]
    assert not any(TOKEN.encode() in data for data in everything)


def test_what_waits_is_uploaded_and_logged_when_a_run_fails(hub, tmp_path, flags, train, capsys, monkeypatch):
    def fail(*_):
        hub.open.set()
        raise UserError("the disk is full")

    monkeypatch.setattr(Saver, "save_final", fail)
    hub.open.clear()
    changes = {"save_every_n_steps": 2, "async_upload": True, "logging_dir": tmp_path / "logs"}
    with pytest.raises(SystemExit):
        train(flags(tmp_path, huggingface_repo_id=REPO, huggingface_token=TOKEN, max_train_steps=5, **changes))
    assert hub[REPO].files.keys() == {"run-step00000002.safetensors", "run-step00000004.safetensors"}
    assert read_log(tmp_path / "logs").Scalars("loss/current")[-1].step == 5
    assert capsys.readouterr().err.rstrip().endswith("error: the disk is full")


def test_a_run_does_not_end_because_the_hub_refuses(hub, tmp_path, flags, train, capsys):
    hub.answer = 500
    train(flags(tmp_path, huggingface_repo_id=REPO, huggingface_token=TOKEN, save_every_n_steps=2))
    assert (tmp_path / "run.safetensors").exists()
    said = capsys.readouterr().err
    assert "run-step00000002.safetensors was not uploaded" in said
    assert f"not uploaded to {REPO}: " in said


def test_nothing_heavy_is_imported():
    code = """
        import sys
        import library.training.hub, library.training.upload
        assert not {"torch", "huggingface_hub"} & sys.modules.keys()
    """
    assert python(code).returncode == 0
