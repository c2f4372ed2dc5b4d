import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from library.models.text import BEGIN, END, TextEncoder, Tokenizer, clean, clip_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "data/golden/tokens_75.json").read_text(encoding="utf-8"))
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


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["caption"][:20])
def test_golden_tokens(tokenizer, golden):
    assert tokenizer([golden["caption"]]).tolist() == [golden["sd1"]]
    assert Tokenizer(pad=0)([golden["caption"]]).tolist() == [golden["sd2"]]


def test_batch_of_ids(tokenizer):
    ids = tokenizer(["", "a red circle", "word " * 200])
    assert ids.shape == (3, 77)
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == [BEGIN] + [END] * 76
    assert (ids[:, 0] == BEGIN).all()
    assert (ids[:, -1] == END).all()


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


def test_encoder_is_transformers_last_layer_through_the_final_norm(tokenizer):
    torch.manual_seed(0)
    encoder = TextEncoder(CONFIG).eval()
    plain = CLIPTextModel(CLIPTextConfig(**CONFIG)).eval()
    plain.load_state_dict(encoder.model.state_dict())
    ids = tokenizer(["a red circle", "blue"])
    with torch.no_grad():
        hidden = encoder(ids)
        layers = plain(input_ids=ids, output_hidden_states=True).hidden_states
        assert torch.allclose(hidden, plain.final_layer_norm(layers[CONFIG["num_hidden_layers"]]), atol=1e-6)
    assert hidden.shape == (2, 77, 64)


def test_rebuilt_buffers_are_those_of_a_fresh_encoder(tokenizer):
    fresh = TextEncoder(CONFIG).eval()
    with torch.device("meta"):
        loaded = TextEncoder(CONFIG).eval()
    loaded.load_state_dict(fresh.state_dict(), assign=True)
    loaded.rebuild_buffers("cpu")
    assert torch.equal(loaded.model.embeddings.position_ids, fresh.model.embeddings.position_ids)
    ids = tokenizer(["a red circle"])
    with torch.no_grad():
        assert torch.equal(loaded(ids), fresh(ids))
