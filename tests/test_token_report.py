"""How much of a caption is read, and the name of the encoders that read it."""

import pytest
import torch

from library.models import registry
from library.models.files.checkpoint import open_weights, write_tensors
from library.models.prompt_weights import CHUNK
from library.models.sgm_keys import CLIP_PREFIX, VAE_PREFIX
from library.models.text import Tokenizer, token_report


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.mark.parametrize("caption", ["", "a red circle", "word " * CHUNK, "word " * CHUNK + " \n "])
def test_a_caption_that_fits_has_no_cut(tokenizer, caption):
    assert token_report(caption, tokenizer) == (len(tokenizer.words(caption)), None)


def test_the_cut_is_the_end_of_the_caption_as_it_is_written(tokenizer):
    caption = "A  Photo, " * 24 + "A  Photo,Caf\u00e9  of\n ETC."
    report = token_report(caption, tokenizer)
    assert report == (75 + 4, "Caf\u00e9  of\n ETC.")
    assert tokenizer.words(caption.removesuffix(report.cut)) == tokenizer.words(caption)[:CHUNK]


@pytest.mark.parametrize("length", [75, 150, 225])
def test_longer_token_lengths_cut_later(tokenizer, length):
    count, cut = token_report("word " * 300, tokenizer, length)
    assert count == 300
    assert cut.split() == ["word"] * (300 - length)


def test_what_gives_weights_is_not_counted(tokenizer):
    caption = "(word " * 74 + "(one:1.3), [Two] " + r"\(three\)"
    assert token_report(caption, tokenizer, weighted=True) == (75 + 1 + 1 + 3, ", Two (three)")
    assert token_report("a (red:1.3) circle", tokenizer, weighted=True) == (3, None)
    assert token_report("a (red:1.3) circle", tokenizer).count == 9


def test_a_cut_within_a_word_or_a_character_takes_all_that_is_not_whole(tokenizer):
    assert token_report("word " * 74 + "Antidisestablish", tokenizer).cut == "disestablish"
    assert token_report("word " * 74 + "\U0001fae8 x", tokenizer).cut == " \U0001fae8 x"


def test_html_entities_before_the_cut_do_not_shift_it(tokenizer):
    assert token_report("salt &amp; pepper " * 25 + "END", tokenizer).cut == " END"


def test_a_cut_behind_an_html_entity_is_found(tokenizer):
    assert token_report("word " * 74 + "&amp;Y", tokenizer).cut == "y"
    assert token_report("word " * 74 + "x&amp;Y", tokenizer).cut == "&amp;Y"


WEIGHTS = {
    CLIP_PREFIX + "final_layer_norm.weight": torch.ones(4),
    CLIP_PREFIX + "encoder.layers.0.mlp.fc1.weight": torch.arange(8.0).reshape(2, 4),
    VAE_PREFIX + "encoder.conv_in.weight": torch.ones(2),
}


def fingerprint(path, tensors, dtype=None) -> str:
    write_tensors(path, tensors, dtype)
    with open_weights(path) as file:
        return registry.fingerprint(file, (CLIP_PREFIX,))


def test_the_fingerprint_is_of_the_encoders_alone(tmp_path):
    ours = fingerprint(tmp_path / "a.safetensors", WEIGHTS)
    others = {
        VAE_PREFIX + "encoder.conv_in.weight": torch.zeros(2),
        CLIP_PREFIX + "embeddings.position_ids": torch.arange(3)[None],
        "cond_stage_model.logit_scale": torch.ones(()),
    }
    assert fingerprint(tmp_path / "b.ckpt", dict(reversed((WEIGHTS | others).items()))) == ours
    respelled = {key.replace("transformer.text_model.", "transformer."): value for key, value in WEIGHTS.items()}
    assert respelled.keys() != WEIGHTS.keys()
    assert fingerprint(tmp_path / "c.safetensors", respelled) == ours


@pytest.mark.parametrize("key", [key for key in WEIGHTS if key.startswith(CLIP_PREFIX)])
def test_every_weight_changes_the_fingerprint(tmp_path, key):
    changed = WEIGHTS[key].clone()
    changed.view(-1)[-1] += 1e-6
    ours = fingerprint(tmp_path / "a.safetensors", WEIGHTS)
    assert fingerprint(tmp_path / "b.safetensors", WEIGHTS | {key: changed}) != ours
    assert fingerprint(tmp_path / "c.safetensors", WEIGHTS | {key: WEIGHTS[key].reshape(-1, 2)}) != ours
    assert fingerprint(tmp_path / "d.safetensors", WEIGHTS, torch.bfloat16) != ours


@pytest.mark.parametrize(
    ("family", "part", "changes"),
    [
        ("sd2", "cond_stage_model.model.ln_final.bias", True),
        ("sd2", "cond_stage_model.model.logit_scale", False),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", True),
        ("sdxl", "conditioner.embedders.1.model.text_projection", True),
        ("sdxl", "model.diffusion_model.out.2.bias", False),
    ],
)
def test_the_fingerprint_of_a_model_is_of_all_its_encoders(tmp_path, model_files, family, part, changes):
    with open_weights(model_files(family)) as file:
        tensors = file.tensors()
    write_tensors(tmp_path / "other.safetensors", tensors | {part: tensors[part] + 1})
    ours, other = (registry.inspect_model(path) for path in (model_files(family), tmp_path / "other.safetensors"))
    assert (ours.text_fingerprint != other.text_fingerprint) == changes
