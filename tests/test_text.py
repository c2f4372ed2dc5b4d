import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel

from library.models.prompt_weights import BEGIN, END
from library.models.text import TextEncoder, Tokenizer, clean, clip_tokenizer, joined, token_report, weigh

GOLDEN = json.loads((Path(__file__).parent / "data/golden/tokens.json").read_text(encoding="utf-8"))
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "hidden_act": "quick_gelu",
    "eos_token_id": END,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def zero_padding() -> Tokenizer:
    return Tokenizer(pad=0)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"{golden['max_token_length']} {golden['caption'][:20]}")
def test_golden_tokens(tokenizer, zero_padding, golden):
    captions, length = [golden["caption"]], golden["max_token_length"]
    assert tokenizer(captions, length).ids.tolist() == [golden["sd1"]] == [golden["sdxl_1"]]
    assert zero_padding(captions, length).ids.tolist() == [golden["sd2"]] == [golden["sdxl_2"]]
    ids, weights = tokenizer(captions, length, weighted=True)
    assert ids.tolist() == [golden["sd1_weighted"]["ids"]]
    expected = torch.tensor([golden["sd1_weighted"]["weights"]])
    assert torch.allclose(torch.ones_like(expected) if weights is None else weights, expected, atol=1e-6)


def test_batch_of_ids(tokenizer):
    ids, weights = tokenizer(["", "a red circle", "word " * 200], 150)
    assert ids.shape == (3, 2, 77)
    assert ids.dtype == torch.int64
    assert ids[0, 1].tolist() == [BEGIN] + [END] * 76
    assert (ids[..., 0] == BEGIN).all()
    assert (ids[..., -1] == END).all()
    assert weights is None


def test_weights_of_a_caption_alone_do_not_touch_those_of_others(tokenizer):
    ids, weights = tokenizer(["a (red:1.5) circle", "a red circle"], weighted=True)
    assert torch.equal(ids[0], ids[1])
    assert weights[0, 0, :6].tolist() == [1, 1, 1.5, 1, 1, 1]
    assert (weights[1] == 1).all()
    assert tokenizer([r"a \(red:1.5\)"], weighted=True).ids.tolist() == tokenizer(["a (red:1.5)"]).ids.tolist()


@settings(deadline=None)
@given(st.text())
def test_any_text_becomes_tokens_and_weights_change_none_where_there_are_no_brackets(tokenizer, caption):
    plain, (ids, weights) = tokenizer([caption], 150), tokenizer([caption], 150, weighted=True)
    assert ids.shape == (1, 2, 77)
    if not set(caption) & set("()[]\\"):
        assert weights is None
        assert torch.equal(ids, plain.ids)


def test_special_ids_of_the_backend():
    backend = clip_tokenizer()
    assert (backend.bos_token_id, backend.eos_token_id, len(backend)) == (BEGIN, END, 49408)
    assert backend.convert_ids_to_tokens([0, 320]) == ["!", "a</w>"]


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("  A  Red\n\tCircle ", "a red circle"),
        ("\u2018one\u2019 \u201ctwo\u201d", "'one' \"two\""),
        ("\uff21\uff22\uff23\uff01\u3000\uff76", "abc! \u30ab"),
        ("\ufb01re \u01c4", "fire d\u017e"),
        ("salt &amp; pepper &#233; &unknown;", "salt & pepper \u00e9 &unknown;"),
        ("<b> &amp; x", "<b> &amp; x"),
        ("e\u0301", "\u00e9"),
        ("\ufeffbom\x00", "bom"),
        ("dash \u2014 stays", "dash \u2014 stays"),
    ],
)
def test_clean(caption, cleaned):
    assert clean(caption) == cleaned


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = TextEncoder(CONFIG).eval()
        torch.nn.init.normal_(encoder.model.final_layer_norm.weight)
        torch.nn.init.normal_(encoder.model.final_layer_norm.bias)
    return encoder


@pytest.fixture(scope="module")
def plain(encoder) -> CLIPTextModel:
    """transformers' own module with the same weights."""
    plain = CLIPTextModel(CLIPTextConfig(**CONFIG)).eval()
    plain.load_state_dict(encoder.model.state_dict())
    return plain


@torch.no_grad()
def test_encoder_is_transformers_last_layer_through_the_final_norm(tokenizer, encoder, plain):
    ids = tokenizer(["a red circle", "blue"]).ids
    hidden = encoder(ids).hidden
    answer = plain(input_ids=ids[:, 0], output_hidden_states=True)
    assert torch.equal(hidden, answer.last_hidden_state)
    layers = answer.hidden_states
    assert torch.allclose(hidden, plain.final_layer_norm(layers[CONFIG["num_hidden_layers"]]), atol=1e-6)
    assert hidden.shape == (2, 77, 64)


@torch.no_grad()
def test_a_layer_from_the_end_goes_through_the_final_norm(tokenizer, encoder, plain):
    ids = tokenizer(["a red circle", "blue"]).ids
    layers = plain(input_ids=ids[:, 0], output_hidden_states=True).hidden_states
    assert torch.allclose(encoder(ids, 1).hidden, plain.final_layer_norm(layers[-1]), atol=1e-6)
    assert torch.equal(encoder(ids, 2).hidden, plain.final_layer_norm(layers[-2]))
    assert not torch.allclose(encoder(ids, 2).hidden, encoder(ids, 1).hidden, atol=1e-2)
    assert encoder.layers == 2


@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_chunks_are_encoded_apart_and_joined(tokenizer, encoder, layer):
    ids = tokenizer(["word " * 100 + "end", "short"], 225).ids
    hidden = encoder(ids, layer).hidden
    assert hidden.shape == (2, 227, 64)
    alone = [encoder(ids[:, [number]], layer).hidden for number in range(3)]
    parts = [alone[0][:, :1], *(one[:, 1:-1] for one in alone), alone[2][:, -1:]]
    assert torch.allclose(hidden, torch.cat(parts, dim=1), atol=1e-5)


def test_tokens_are_multiplied_by_their_weights(tokenizer):
    hidden = torch.randn(2, 152, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    weights = tokenizer(["(word:2) " * 80, "a [b]"], 150, weighted=True).weights
    scales = joined(weights)
    assert scales[0].tolist() == [1] + [2] * 80 + [1] * 71
    expected = hidden * scales[:, :, None]
    assert torch.allclose(weigh(hidden, weights), expected)
    restored = weigh(hidden, weights, restore_mean=True)
    assert torch.allclose(restored.mean((1, 2)), hidden.mean((1, 2)), atol=1e-5)
    ratios = restored / expected
    assert torch.allclose(ratios, ratios[:, :1, :1].expand_as(ratios), atol=1e-4)
    assert (ratios[0] - 1).abs().max() > 0.1
    assert weigh(hidden, None, restore_mean=True) is hidden


def test_restoring_the_mean_leaves_captions_without_weights_alone():
    hidden = torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden[1] -= hidden[1]
    weights = torch.ones(2, 1, 77)
    assert torch.equal(weigh(hidden, weights, restore_mean=True), hidden)
    assert weigh(hidden, weights * 2).dtype == torch.bfloat16


def test_rebuilt_buffers_are_those_of_a_fresh_encoder(tokenizer):
    fresh = TextEncoder(CONFIG).eval()
    with torch.device("meta"):
        loaded = TextEncoder(CONFIG).eval()
    loaded.load_state_dict(fresh.state_dict(), assign=True)
    loaded.rebuild_buffers("cpu")
    assert torch.equal(loaded.model.embeddings.position_ids, fresh.model.embeddings.position_ids)
    ids = tokenizer(["a red circle"]).ids
    with torch.no_grad():
        assert torch.equal(loaded(ids).hidden, fresh(ids).hidden)


class TestAddedWords:
    def words(self, caption, **added):
        tokenizer = Tokenizer()
        plain = Tokenizer().words
        tokenizer.add({"sks": [50001, 50002], "sks1": [50002], "<x>": [50003], **added})
        return tokenizer.words(caption), plain

    def test_whole_words_only_in_capitals_or_not_and_the_longest_first(self):
        ids, plain = self.words("SKS, sksy, a sks toy's sks1 a<x>b", **{"sks toy": [50004]})
        expected = [50001, 50002, *plain(", sksy, a"), 50004, *plain("'s"), 50002, *plain("a"), 50003, *plain("b")]
        assert ids == expected

    def test_a_word_with_a_weight_and_the_cut(self):
        tokenizer = Tokenizer()
        tokenizer.add({"sks": [50001, 50002]})
        tokens = tokenizer(["a (sks:1.5) cat"], weighted=True)
        assert tokens.ids[0, 0, 2:4].tolist() == [50001, 50002]
        assert tokens.weights[0, 0, :6].tolist() == [1, 1, 1.5, 1.5, 1, 1]
        report = token_report("Sks red Cat", tokenizer, length=3)
        assert (report.count, report.cut.strip()) == (4, "Cat")
