"""Where a tagger's files come from: a folder, or a hub on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.errors import UserError
from library.preprocessing.tagging.files import find_tagger
from tests import tagger_models
from tests.hub_stand_in import HubStandIn, Repository, hub_stand_in
from tests.test_upload import ask

REPO = "me/my-tagger"


@pytest.fixture
def local(tmp_path) -> Path:
    """A tagger in a folder of its own."""
    return tagger_models.constant_tagger(tmp_path / "local")


@pytest.fixture
def hub(monkeypatch, tmp_path, fresh_console, local) -> Iterator[HubStandIn]:
    """A hub with one tagger."""
    with hub_stand_in() as hub:
        ask(monkeypatch, hub.url, tmp_path)
        files = contents(local)
        hub.repositories["models", REPO] = Repository(False, [("0" * 40, {}), ("1" * 40, files | {"README.md": b"x"})])
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_tagger_is_downloaded_once(hub, tmp_path, local):
    folder = find_tagger(tmp_path / "taggers", REPO, named=False)
    assert folder == tmp_path / "taggers" / "me_my-tagger"
    assert contents(tmp_path / "taggers") == {f"me_my-tagger/{name}": data for name, data in contents(local).items()}
    asked = len(hub.requests)
    assert find_tagger(tmp_path / "taggers", REPO, named=True) == folder
    assert len(hub.requests) == asked
    find_tagger(tmp_path / "taggers", REPO, named=True, download=True)
    assert len(hub.requests) > asked


def test_a_folder_that_is_a_tagger_needs_no_hub(hub, local, tmp_path):
    assert find_tagger(local, REPO, named=False) == local
    with pytest.raises(UserError, match=r"--force_download: .*local holds a model\.onnx that would still be used"):
        find_tagger(local, REPO, named=False, download=True)
    assert not hub.requests
    assert find_tagger(local, REPO, named=True) == local / "me_my-tagger"  # the user names another one


def test_a_download_that_is_killed_leaves_what_was_there(hub, tmp_path, monkeypatch):
    import huggingface_hub

    taggers = tmp_path / "taggers"
    download = huggingface_hub.hf_hub_download

    def killed(repo_id: str, name: str, **options: object) -> str:
        if name == "selected_tags.csv":
            raise KeyboardInterrupt
        return download(repo_id, name, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", killed)
    with pytest.raises(KeyboardInterrupt):
        find_tagger(taggers, REPO, named=True)
    assert not (taggers / "me_my-tagger").exists()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    folder = find_tagger(taggers, REPO, named=True)
    assert [request for request in hub.requests if request.startswith("GET") and "model.onnx" in request] == [
        f"GET /{REPO}/resolve/{'1' * 40}/model.onnx"
    ]
    before = contents(taggers)
    files = hub["me/my-tagger"].files
    hub["me/my-tagger"].commits.append(("2" * 40, {name: data + b"new" for name, data in files.items()}))
    move = os.replace

    def killed_between(source: Path, target: Path) -> None:
        if Path(source).name == "selected_tags.csv":
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_between)
        with pytest.raises(KeyboardInterrupt):
            find_tagger(taggers, REPO, named=True, download=True)
    assert not (folder / "selected_tags.csv").exists()  # a new model with an old list would pass for a tagger
    find_tagger(taggers, REPO, named=True)
    assert contents(taggers).keys() == before.keys()
    assert all(data.endswith(b"new") for data in contents(taggers).values())


def test_what_else_is_in_the_folders_stays(hub, tmp_path, local):
    """The older models were Keras files in the same places."""
    taggers = tmp_path / "taggers"
    for folder in (taggers, taggers / "me_my-tagger"):
        (folder / "variables").mkdir(parents=True)
        for name in ("saved_model.pb", "selected_tags.csv", "variables/variables.index"):
            (folder / name).write_text("old")
    old = contents(taggers)
    assert find_tagger(taggers, REPO, named=False) == taggers / "me_my-tagger"
    assert contents(taggers) == old | {f"me_my-tagger/{name}": data for name, data in contents(local).items()}


def test_what_the_hub_has_is_found_without_it(hub, tmp_path, local):
    from huggingface_hub import snapshot_download

    snapshot_download(REPO)
    hub.answer = 503
    assert contents(find_tagger(tmp_path / "taggers", REPO, named=True)) == contents(local)


def test_what_the_hub_refuses(hub, tmp_path):
    def refused(name: str) -> str:
        with pytest.raises(UserError) as mistake:
            find_tagger(tmp_path / "taggers", name, named=True)
        assert not (tmp_path / "taggers").exists()
        return str(mistake.value)

    assert "--repo_id: me/nothing is no file or folder here" in refused("me/nothing")
    assert "is not written as owner/name" in refused("nothing")
    del hub[REPO].files["selected_tags.csv"]
    assert f"--repo_id: the repository {REPO} has no selected_tags.csv" in refused(REPO)
    hub.answer = 503
    assert "the hub does not give it away at present (503)" in refused(REPO)
