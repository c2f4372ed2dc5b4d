"""Names of models: files, folders and repositories. Nothing here reaches for the network."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from library.errors import UserError
from library.hub import looks_like_hub_id
from library.models.files.hub import find_model, wanted_files
from tests.hub_stand_in import Repository, ask, hub_stand_in
from tests.processes import python

OWN = ("model_index.json", "README.md", "v1-5.safetensors", "scheduler/scheduler_config.json", "safety_checker/x.bin")
CONFIGS = tuple(f"{name}/config.json" for name in ("unet", "vae", "text_encoder"))


@pytest.mark.parametrize("name", ["runwayml/stable-diffusion-v1-5", "a/b", "me/sdxl_v1.0"])
def test_names_of_repositories(name):
    assert looks_like_hub_id(name)


@pytest.mark.parametrize("name", ["model", "./a/b", "/a/b", "a/b/c", "a/b.safetensors", "a\\b", "", "a/", "a b/c"])
def test_names_of_files(name):
    assert not looks_like_hub_id(name)


def test_no_heavy_package_is_imported():
    code = """
        import sys
        import library.models.files.hub
        assert not {"torch", "huggingface_hub", "diffusers"} & sys.modules.keys()
    """
    assert python(code).returncode == 0


def test_what_is_here_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find_model("owner/name").is_dir()
    with pytest.raises(UserError, match=r"--vae: owner/nane does not exist, did you mean owner/name\?"):
        find_model("owner/nane", "--vae")
    with pytest.raises(UserError, match=r"--pretrained_model_name_or_path: x\.ckpt does not exist"):
        find_model("x.ckpt")


def test_only_what_is_read_is_downloaded():
    both = [f"unet/diffusion_pytorch_model{end}" for end in (".bin", ".safetensors", ".fp16.safetensors")]
    texts = ["text_encoder/model.safetensors.index.json", "text_encoder/model-00001-of-00002.safetensors"]
    names = {*OWN, *CONFIGS, *both, *texts, "vae/diffusion_pytorch_model.fp16.bin", "vae/diffusion_pytorch_model.bin"}
    wanted = wanted_files(names)
    weights = {name for name in wanted if name.endswith(("bin", "safetensors", ".index.json"))}
    assert weights == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model-*-of-*.safetensors",
        "original_layout.safetensors",
    }
    assert {"model_index.json", "scheduler/*.json", "tokenizer/*.txt", *CONFIGS} <= {*wanted}
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in wanted_files(names, "fp16")
    assert wanted_files(names, vae_alone=True) == ["vae/config.json", "vae/diffusion_pytorch_model.bin"]


def test_a_repository_that_is_an_autoencoder():
    names = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "README.md"]
    assert wanted_files(names, vae_alone=True) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert wanted_files(names) == []


def answer(monkeypatch, result):
    """Have the hub list these files, or fail like this."""

    def model_info(self, name, **arguments):
        if isinstance(result, BaseException):
            raise result
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in result], sha="1" * 40)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


def refusal(kind, status):
    """The answer of a hub that refuses."""
    return kind("no", response=SimpleNamespace(status_code=status, headers={}, request=None))


class TransportError(Exception):
    """Stands for that of whichever HTTP client is in use."""

    __module__ = "httpx9"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (refusal(RepositoryNotFoundError, 404), "is no file or folder here, and the hub has no such repository"),
        (refusal(GatedRepoError, 403), "open only to those who have accepted its terms"),
        (TransportError("no route"), "the hub cannot be reached, and its cache has no copy"),
        (OSError("timed out"), "the hub cannot be reached, and its cache has no copy"),
        (refusal(HfHubHTTPError, 503), r"not give it away at present \(503\), and its cache has no copy"),
        (OfflineModeIsEnabled("off"), "switched off by HF_HUB_OFFLINE, and its cache has no copy"),
        (OWN[1:], "has no model_index.json, .*: download v1-5.safetensors from it"),
    ],
)
def test_why_a_repository_cannot_be_had_is_said(monkeypatch, cache, result, said):
    answer(monkeypatch, result)
    with pytest.raises(UserError, match=said) as caught:
        find_model("owner/name")
    assert "\n" not in str(caught.value)


def test_a_repository_is_downloaded(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, **arguments):
        asked[name] = arguments
        return str(tmp_path)

    answer(monkeypatch, {*OWN, *CONFIGS})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_model("owner/name") == tmp_path
    assert "README.md" not in asked["owner/name"]["allow_patterns"]


def test_without_a_network_the_cache_will_do(tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    code = "from library.models.files.hub import find_model; print(find_model('owner/name'))"
    result = python(code, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert result.stdout.strip() == str(snapshot), result.stderr


def test_what_was_downloaded_of_a_repository_is_found_without_the_hub(monkeypatch, tmp_path):
    with hub_stand_in() as hub:
        ask(monkeypatch, hub.url, tmp_path)
        files = dict.fromkeys((*OWN, *CONFIGS, "unet/diffusion_pytorch_model.safetensors"), b"x")
        hub.repositories["models", "me/model"] = Repository(False, [("1" * 40, files)])
        folder = find_model("me/model")
        assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
        assert not (folder / "README.md").exists()
        hub.answer = 503
        assert find_model("me/model") == folder
