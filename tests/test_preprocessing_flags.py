"""The flags of the tools that prepare pictures against the tables of what users' command lines rely on, and what such
tools refuse before they import anything heavy.
"""

import ast
import inspect
import json
from pathlib import Path

import pytest

from library import cli
from library.errors import UserError
from library.options import options_of
from library.options.work import WorkOptions
from tests.processes import ROOT, python
from tests.test_options import alike, flags_of, groups_of, table

WORK = {"--force", "--max_data_loader_n_workers"}
"""What tools that work through pictures have."""
# Tools that there are tables for, and their flags that no table has.
OURS = {
    "finetune.clean_captions_and_tags": {"--force", "--rules"},
    "finetune.merge_captions_to_metadata": {"--force"},
    "finetune.merge_dd_tags_to_metadata": {"--force"},
    "finetune.prepare_buckets_latents": {"--force", "--no_half_vae", "--vae"},
    "finetune.tag_images_by_wd14_tagger": {"--force", "--provider"},
    "tools.canny": {*WORK, "--recursive"},
    "tools.resize_images_to_resolution": {*WORK, "--recursive"},
}
# Of the others, flags and defaults that users' command lines rely on, and the flags that are only ours.
CAPTIONS = {
    "train_data_dir": "None",
    "--caption_extension": "'.caption'",
    "--batch_size": "1",
    "--max_data_loader_n_workers": "None",
    "--debug": "False",
    "--recursive": "False",
}
WITHOUT_TABLE: dict[str, tuple[dict[str, str], set[str]]] = {
    "finetune.make_captions": (
        CAPTIONS
        | {
            "--caption_extention": "'.caption'",
            "--beam_search": "False",
            "--num_beams": "1",
            "--top_p": "0.9",
            "--max_length": "75",
            "--min_length": "5",
            "--seed": "42",
        },
        {"--caption_weights", "--device", "--force", "--model_id", "--precision", "--prompt"},
    ),
    "finetune.make_captions_by_git": (
        CAPTIONS | {"--model_id": "'microsoft/git-large-textcaps'", "--max_length": "50", "--remove_words": "False"},
        {"--caption_extention", "--device", "--force", "--precision"},
    ),
    "tools.detect_face_rotate": (
        {
            "--src_dir": "None",
            "--dst_dir": "None",
            "--rotate": "False",
            "--resize_fit": "False",
            "--resize_face_size": "None",
            "--crop_size": "None",
            "--crop_ratio": "None",
            "--min_size": "None",
            "--max_size": "None",
            "--multiple_faces": "False",
            "--debug": "False",
        },
        {*WORK, "--model", "--recursive", "--score_threshold"},
    ),
}
TOOLS = (*OURS, *WITHOUT_TABLE)
# What is not as in the tables: both spellings of the extension are one setting.
OTHERWISE = {
    "finetune.merge_captions_to_metadata": {
        "--caption_extention": {"dest": "caption_extension", "default": "'.caption'"}
    },
    "finetune.tag_images_by_wd14_tagger": {"--caption_extention": {"dest": "caption_extension", "default": "'.txt'"}},
}
HEAVY = ("torch", "transformers", "diffusers", "onnxruntime")
# Read by a name that is put together, or with no effect.
NOT_AS_ATTRIBUTES = {"onnx"} | {
    f"{kind}_threshold" for kind in ("artist", "character", "copyright", "general", "meta", "model")
}
# The shortest words of each, naming what is not there.
MISSING = {
    "finetune.clean_captions_and_tags": "missing.json out.json",
    "finetune.make_captions": "missing",
    "finetune.make_captions_by_git": "missing",
    "finetune.merge_captions_to_metadata": "missing out.json",
    "finetune.merge_dd_tags_to_metadata": "missing out.json",
    "finetune.prepare_buckets_latents": "missing in.json out.json model.safetensors",
    "finetune.tag_images_by_wd14_tagger": "missing",
    "tools.canny": "--input missing --output out",
    "tools.detect_face_rotate": "--src_dir missing --dst_dir out",
    "tools.resize_images_to_resolution": "missing out",
}


@pytest.mark.parametrize("tool", OURS)
def test_flags_of_a_tool_are_those_of_its_table(tool):
    otherwise = OTHERWISE.get(tool, {})
    expected = {flag: comparable(row | otherwise.get(flag, {})) for flag, row in table(tool.replace(".", "__")).items()}
    ours = {flag: comparable(row) for flag, row in flags_of(tool).items()}
    assert {flag: row for flag, row in ours.items() if flag in expected} == expected
    assert ours.keys() - expected.keys() == OURS[tool]


def comparable(row: dict[str, str]) -> dict[str, str]:
    """What is missing is said in a sentence of ours, not in that of the parser; and a path is a text to users."""
    return {**alike(row), "required": "", "type": row["type"].replace("Path", "str")}


@pytest.mark.parametrize("tool", WITHOUT_TABLE)
def test_flags_of_a_tool_without_a_table(tool):
    expected, more = WITHOUT_TABLE[tool]
    ours = {flag: row["default"] for flag, row in flags_of(tool).items()}
    assert {flag: default for flag, default in ours.items() if flag in expected} == expected
    assert ours.keys() - expected.keys() == more


@pytest.mark.parametrize("tool", TOOLS)
def test_every_flag_is_read_somewhere(tool):
    """As an attribute, in the tool's script, its groups of options, or where its work is done."""
    groups = groups_of(tool)
    places = [ROOT / f"{tool.replace('.', '/')}.py", *(Path(inspect.getfile(group)) for group in groups)]
    places += [*(ROOT / "library" / "preprocessing").rglob("*.py"), ROOT / "library" / "training" / "bucket_latents.py"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in places]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {option.name for group in groups for option in options_of(group)} - read - NOT_AS_ATTRIBUTES


@pytest.mark.parametrize("tool", TOOLS)
def test_words_that_are_missing_or_misspelt_are_refused(tool):
    with pytest.raises(UserError):
        cli.parse(groups_of(tool), [], description="")
    with pytest.raises(UserError, match="--debgu: unknown option"):
        cli.parse(groups_of(tool), [*MISSING[tool].split(), "--debgu"], description="")


def test_what_is_missing_is_refused_before_anything_heavy_is_imported(tmp_path):
    code = f"""
        import importlib, json, os, sys
        sys.path.insert(0, {str(ROOT)!r})
        os.chdir({str(tmp_path)!r})
        from library.errors import UserError
        found = {{}}
        for tool, words in {MISSING!r}.items():
            sys.argv = [tool, *words.split()]
            try:
                importlib.import_module(tool).main()
                said = ""
            except UserError as mistake:
                said = str(mistake)
            found[tool] = [said, sorted(set({HEAVY!r}) & set(sys.modules))]
            for name in [name for name in sys.modules if name.partition(".")[0] in {HEAVY!r}]:
                del sys.modules[name]
        print(json.dumps(found))
    """
    ended = python(code)
    found = json.loads(ended.stdout.splitlines()[-1]) if not ended.returncode else pytest.fail(ended.stderr)
    assert {tool: [*heavy] for tool, (_, heavy) in found.items() if heavy} == {}
    assert {tool: said for tool, (said, _) in found.items() if "missing" not in said} == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("cpus", "given", "threads"), [(4, None, 3), (1, None, 1), (64, None, 8), (4, 0, 1)])
def test_as_many_threads_read_as_are_wanted(monkeypatch, cpus, given, threads):
    monkeypatch.setattr("os.cpu_count", lambda: cpus)
    assert WorkOptions(max_data_loader_n_workers=given).threads == threads
