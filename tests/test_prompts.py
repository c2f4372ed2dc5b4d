import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.errors import UserError
from library.generation import prompts
from library.generation.prompts import PromptLine, parse_line, read_prompts

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests/data/golden/prompt_lines.json").read_text(encoding="utf-8"))
FILE_KEYS = {"sampler": "sample_sampler", "control_image": "controlnet_image"}


def as_dict(line: PromptLine) -> dict:
    values = dataclasses.asdict(line)
    return {FILE_KEYS.get(key, key): value for key, value in values.items() if value is not None}


@pytest.fixture
def warnings(monkeypatch):
    texts = []
    monkeypatch.setattr(prompts, "warn", texts.append)
    return texts


@pytest.mark.parametrize("row", GOLDEN, ids=[row["line"] for row in GOLDEN])
def test_golden_lines(row):
    assert as_dict(parse_line(row["line"])) == row["result"]


@pytest.mark.parametrize("row", GOLDEN, ids=[row["line"] for row in GOLDEN])
def test_golden_results_read_from_json_and_toml(row, tmp_path):
    json_file, toml_file = tmp_path / "prompts.json", tmp_path / "prompts.toml"
    json_file.write_text(json.dumps([row["result"]]))
    keys = "\n".join(f"{key} = {json.dumps(value)}" for key, value in row["result"].items())
    toml_file.write_text(f"[prompt]\n[[prompt.subset]]\n{keys}\n")
    assert [as_dict(line) for line in read_prompts(json_file)] == [row["result"]]
    assert read_prompts(toml_file) == read_prompts(json_file)


@given(
    prompt=st.from_regex(r"[a-z(),:.\d -]*[a-z]", fullmatch=True).filter(lambda text: " --" not in f" {text}"),
    width=st.integers(1, 4096),
    seed=st.integers(0, 2**64 - 1),
    scale=st.floats(0, 30),
)
def test_what_is_written_is_what_is_read(prompt, width, seed, scale):
    line = parse_line(f"{prompt} --w {width} --d {seed} --l {scale!r}")
    assert line == PromptLine(prompt.strip(), width=width, seed=seed, scale=scale)


def test_last_option_wins_and_minus_one_is_no_seed():
    assert parse_line("x --d 3 --d -1 --w 64 --w 128") == PromptLine("x", width=128)


def test_steps_stay_within_the_noise_levels():
    assert parse_line("x --s 0").sample_steps == 1
    assert parse_line("x --s 5000").sample_steps == prompts.MAX_STEPS


def test_leftovers_are_named(warnings):
    assert parse_line("x --w 64, --width 128 --h 64 tall -- dash") == PromptLine("x", width=64, height=64)
    assert warnings == [
        'prompt line: "--width 128" is not an option of prompt lines and is left out, did you mean --w?',
        'prompt line: "tall" after --h 64 is left out',
        'prompt line: "-- dash" is not an option of prompt lines and is left out',
    ]


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("--w wide", "--w has to be a whole number, not 'wide'"),
        ("--w", "--w has to be a whole number, not ''"),
        ("--h 0", "--h has to be at least 1, not '0'"),
        ("--s 2.5", "--s has to be a whole number, not '2.5'"),
        ("--l nan", "--l has to be a number, not 'nan'"),
        ("--d -7", "--d has to be a seed from 0 to 18446744073709551615, not '-7'"),
        ("--ss euler_b", "--ss: there is no sampler 'euler_b', did you mean euler_a?"),
    ],
)
def test_impossible_values(piece, message, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"# a comment\n\nfine\nx {piece}\n")
    with pytest.raises(UserError) as caught:
        read_prompts(file)
    assert str(caught.value) == f"{file}, line 4: {message}"


def test_text_file(tmp_path):
    file = tmp_path / "prompts.TXT"
    file.write_bytes("\ufeffa café --d 1\r\n  # not this\r\n\r\n  a #2 pencil\r\n".encode())
    assert read_prompts(file) == (PromptLine("a café", seed=1), PromptLine("a #2 pencil"))


def test_toml_file(tmp_path):
    file = tmp_path / "prompts.toml"
    file.write_text(
        "[prompt]\nwidth = 512\nscale = 12\nnegative_prompt = 'blurry'\n"
        "[[prompt.subset]]\nprompt = 'a --w 7'\n"
        "[[prompt.subset]]\nprompt = 'b'\nwidth = 640\nsample_sampler = 'k_euler'\nseed = -1\n"
    )
    assert read_prompts(file) == (
        PromptLine("a --w 7", "blurry", width=512, scale=12.0),
        PromptLine("b", "blurry", width=640, scale=12.0, sampler="k_euler"),
    )


def test_json_file(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text('["a --w 128", {"prompt": "b", "controlnet_image": "c.png", "seed": null}]')
    assert read_prompts(file) == (PromptLine("a", width=128), PromptLine("b", control_image="c.png"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "# nothing\n", ": the file holds no prompt"),
        ("p.md", "a cat", ": a prompt file has to end in .txt, .toml, .json"),
        ("p.txt", b"fine\n\xff\xfe", ", line 2: this prompt file is not UTF-8 text"),
        ("p.toml", "[prompt]\nwidth = = 3\n", ", line 2: this prompt file is not valid TOML"),
        ("p.toml", "prompt = 3\n[[prompt.subset]]\nprompt = 'a'\n", ", line 2: this prompt file is not valid TOML"),
        ("p.toml", "prompt = 3\n", ": the file needs one [[prompt.subset]]"),
        ("p.toml", "[prompts]\n", ": the file needs one [[prompt.subset]]"),
        ("p.toml", "[prompt]\n[prompt.subset]\nprompt = 'a'", ": prompt.subset has to be written [[prompt.subset]]"),
        ("p.toml", "[prompt]\nseed = 'x'\n", ": prompt.seed has to be a whole number, not 'x'"),
        ("p.toml", "[[prompt.subset]]\nseed = 1\n", ": prompt.subset[0] has no prompt"),
        ("p.json", "[\n{]", ", line 2: this prompt file is not valid JSON"),
        ("p.json", '{"prompt": "a"}', ": the file has to be a list of prompts"),
        ("p.json", "[7]", ": [0] has to be a prompt or a table of options, not 7"),
        ("p.json", '["a", {"prompt": 3}]', ": [1].prompt has to be a text, not 3"),
        ("p.json", '["a", "b --w x"]', ": [1]: --w has to be a whole number, not 'x'"),
        ("p.json", '[{"prompt": "a", "width": true}]', ": [0].width has to be a whole number, not True"),
        ("p.json", '[{"prompt": "a", "height": 1e999}]', ": [0].height has to be a whole number, not inf"),
        ("p.json", '[{"prompt": "a", "seed": []}]', ": [0].seed has to be a whole number, not []"),
    ],
)
def test_bad_files(name, text, message, tmp_path):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_prompts(file)
    assert str(caught.value).startswith(f"{file}{message}")


def test_missing_file_proposes_its_neighbour(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat")
    with pytest.raises(UserError, match=r"there is no such prompt file, did you mean .*prompts\.txt\?"):
        read_prompts(tmp_path / "promts.txt")
    with pytest.raises(UserError, match="there is no such prompt file"):
        read_prompts(tmp_path / "nowhere" / "prompts.txt")


def test_unknown_keys_are_named(warnings, tmp_path):
    file = tmp_path / "p.json"
    file.write_text('[{"prompt": "a", "sampler_steps": 3}]')
    assert read_prompts(file) == (PromptLine("a"),)
    assert warnings == [f"{file}: [0].sampler_steps is not a known key and is left out, did you mean sample_steps?"]


def test_prompts_need_no_torch():
    code = "import sys, library.generation.prompts; sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
