"""From a folder of pictures to a trained model, by the very commands of the page that tells how."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.captioners import save_blip
from tests.hub_stand_in import HubStandIn, Repository, hub_stand_in
from tests.tagger_models import network_model, write_tagger
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "preprocessing.md"
CAPTIONER, TAGGER = "Salesforce/blip-image-captioning-large", "SmilingWolf/wd-v1-4-convnext-tagger-v2"
TAGS = [*(("general", 9), ("sensitive", 9)), *((name, 0) for name in ("simple_background", "no_humans", "^_^", "solo"))]
SCRIPTS = {"python": [sys.executable], "accelerate": [sys.executable, "-m", "accelerate.commands.launch"]}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[HubStandIn]:
    """A hub with a small captioner and a small tagger under the names of the large ones."""
    folder = tmp_path_factory.mktemp("hub")
    write_tagger(folder / "tagger", network_model(len(TAGS)), TAGS)
    with hub_stand_in() as hub:
        for name, place in ((CAPTIONER, save_blip(folder / "captioner")), (TAGGER, folder / "tagger")):
            files = {path.name: path.read_bytes() for path in place.iterdir()}
            hub.repositories["models", name] = Repository(False, [("1" * 40, files)])
        yield hub


def commands() -> list[list[str]]:
    lines = "\n".join(blocks(PAGE, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith(("python ", "accelerate "))]


def test_the_whole_way_from_pictures_to_a_model(hub, tmp_path):
    for name in ("examples", "finetune", "library", "networks", "fine_tune.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    said = []
    for program, *words in commands():
        words = words[1:] if program == "accelerate" else words
        ended = subprocess.run(
            [*SCRIPTS[program], *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0, ended.stderr
        said.append(ended.stdout)
    pictures = sorted((tmp_path / "train_data").glob("*.png"))
    assert len(pictures) == 24
    merged, metadata = (
        json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("meta_cap_dd.json", "meta_lat.json")
    )
    assert sorted(metadata) == [str(picture) for picture in pictures]
    for picture in pictures:
        entry = metadata[str(picture)]
        for name, ending in (("caption", ".caption"), ("tags", ".txt")):
            assert merged[str(picture)][name] == picture.with_suffix(ending).read_text().strip()
        assert "woman" not in entry["caption"]
        assert "_" not in entry["tags"].replace("^_^", "")
        assert set(entry["train_resolution"]) <= {48, 64, 80}
        assert picture.with_suffix(".npz").exists()
    assert re.search(r"24 written, 0 skipped, 0 failed", said[1])
    assert list((tmp_path / "fine_tuned").glob("shapes.*"))
    assert not any(path.name.endswith(".tmp") or "unfinished" in path.name for path in tmp_path.rglob("*"))
