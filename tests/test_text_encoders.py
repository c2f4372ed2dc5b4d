"""What each family's text encoders say, against plain transformers and against OpenCLIP's own way to compute it."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from library.models.family import Family
from library.models.files.checkpoint import write_tensors
from library.models.prompt_weights import BEGIN, END
from library.models.registry import FAMILIES, load_model
from library.models.sgm_keys import OPEN_CLIP_PREFIX, SDXL_OPEN_CLIP_PREFIX
from library.models.text import TextOptions, Tokenizer
from tests import tiny

GOLDEN = json.loads((Path(__file__).parent / "data/golden/tokens.json").read_text(encoding="utf-8"))
LONG = "a red circle on " + "very " * 90 + "white paper"
CAPTIONS = ("a red circle", "", LONG)
# The key of the encoders' tokens in the golden file.
TOKENS = {"sd1": ("sd1",), "sd2": ("sd2",), "sdxl": ("sdxl_1", "sdxl_2")}


class OpenClipText(nn.Module):
    """The text half of OpenCLIP (Ilharco et al. 2021) under the names that its files have."""

    def __init__(self, width: int, layers: int, projection: int):
        super().__init__()
        self.token_embedding = nn.Embedding(49408, width)
        self.positional_embedding = nn.Parameter(torch.empty(77, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(self.block(width) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, projection))
        self.logit_scale = nn.Parameter(torch.empty(()))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            parameter.data.normal_(std=0.2, generator=generator)
            if "ln_" in name and name.endswith("weight"):
                parameter.data += 1

    @staticmethod
    def block(width: int) -> nn.Module:
        block = nn.Module()
        block.ln_1, block.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        block.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        block.mlp = nn.Module()
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        return block

    def forward(self, ids: Tensor) -> list[Tensor]:
        """Ids (B, 77) -> the states (B, 77, width) before the first block and after each."""
        states = [self.token_embedding(ids) + self.positional_embedding]
        mask = torch.full((77, 77), -torch.inf).triu(1)
        for block in self.transformer.resblocks:
            x = states[-1]
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            x = x + block.mlp.c_proj(nn.functional.gelu(block.mlp.c_fc(block.ln_2(x))))
            states.append(x)
        return states


WIDTH, PROJECTION = 128, 48
_TEXT = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 2 * WIDTH}
CHANGES = {
    "sd2": {"clip_config": _TEXT, "unet_config": {"cross_attention_dim": WIDTH}},
    "sdxl": {"open_clip_config": _TEXT, "unet_config": {"cross_attention_dim": 32 + WIDTH}},
}


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def original(request, tmp_path_factory) -> tuple[OpenClipText, Family]:
    """OpenCLIP's encoder, and the model loaded from a file that has its weights."""
    prefix = OPEN_CLIP_PREFIX if request.param == "sd2" else SDXL_OPEN_CLIP_PREFIX
    encoder = OpenClipText(WIDTH, 3 if request.param == "sd2" else 2, PROJECTION).eval()
    others = tiny.make_model(request.param, **CHANGES[request.param]).tensors()
    tensors = {key: tensor for key, tensor in others.items() if not key.startswith(prefix)}
    tensors |= {prefix + name: tensor for name, tensor in encoder.state_dict().items()}
    path = tmp_path_factory.mktemp("original") / "model.safetensors"
    write_tensors(path, tensors)
    return encoder, load_model(path)


@torch.no_grad()
def test_open_clip_is_computed_as_it_was_published(original):
    encoder, model = original
    ids = Tokenizer(pad=0)(CAPTIONS).ids[:, 0]
    states = encoder(ids)
    text = model.encode_text(CAPTIONS)
    if model.name == "sd2":  # of the file's three layers the last is not used
        torch.testing.assert_close(text["hidden_state1"], encoder.ln_final(states[2]), rtol=1e-4, atol=1e-4)
        return
    torch.testing.assert_close(text["hidden_state2"], states[1], rtol=1e-4, atol=1e-4)
    ends = [row.index(END) for row in ids.tolist()]
    last = encoder.ln_final(states[2])[range(3), ends]
    torch.testing.assert_close(text["pool2"], last @ encoder.text_projection, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_open_clip_goes_back_to_its_file_as_it_came(original):
    encoder, model = original
    prefix = OPEN_CLIP_PREFIX if model.name == "sd2" else SDXL_OPEN_CLIP_PREFIX
    written = {key.removeprefix(prefix): tensor for key, tensor in model.tensors().items() if key.startswith(prefix)}
    weights = encoder.state_dict()
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)


@pytest.fixture(scope="module")
def models() -> dict[str, Family]:
    """Of every family, one with three layers in its text encoders and final norms that do something."""
    models = {}
    for family in tiny.CONFIGS:
        names = ("clip_config", "open_clip_config") if family == "sdxl" else ("clip_config",)
        models[family] = tiny.make_model(family, **{name: {"num_hidden_layers": 3} for name in names})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for encoder in models[family].text_encoders:
                nn.init.normal_(encoder.clip.final_layer_norm.weight)
                nn.init.normal_(encoder.clip.final_layer_norm.bias, mean=0.3)
    return models


@pytest.fixture(params=list(tiny.CONFIGS))
def model(request, models):
    """Each family's, reading captions as usual afterwards."""
    yield models[request.param]
    models[request.param].read_captions(TextOptions())


def plain_encoders(model: Family) -> list[nn.Module]:
    """transformers' own modules with the model's weights."""
    plain = []
    for encoder in model.text_encoders:
        kind = CLIPTextModelWithProjection if encoder.projects else CLIPTextModel
        plain.append(kind(encoder.clip.config).eval())
        plain[-1].load_state_dict(encoder.model.state_dict())
    return plain


def plain_hidden(encoder: nn.Module, ids: Tensor, layer: int, norm: bool) -> Tensor:
    """One layer's states for ids (B, n, 77), by one plain call per chunk, joined by hand."""
    parts = []
    for number in range(ids.shape[1]):
        states = encoder(input_ids=ids[:, number], output_hidden_states=True).hidden_states[-layer]
        parts.append(encoder.final_layer_norm(states) if norm else states)
    middles = [part[:, 1:-1] for part in parts]
    return torch.cat([parts[0][:, :1], *middles, parts[-1][:, -1:]], dim=1)


@pytest.mark.parametrize("length", [75, 150, 225])
@pytest.mark.parametrize("clip_skip", [None, 1, 2, 3])
@torch.no_grad()
def test_hidden_states_are_those_of_plain_transformers(model, length, clip_skip):
    model.read_captions(TextOptions(length, clip_skip))
    text = model.encode_text(CAPTIONS)
    xl = model.name == "sdxl"
    layer = clip_skip or (2 if xl else 1)
    encoders = plain_encoders(model)
    for number, (encoder, tokenizer) in enumerate(zip(encoders, model.tokenizers().values(), strict=True), 1):
        ids = tokenizer(CAPTIONS, length).ids
        expected = plain_hidden(encoder, ids, layer, norm=not xl)
        assert expected.shape[1] == length + 2
        torch.testing.assert_close(text[f"hidden_state{number}"], expected, rtol=1e-4, atol=1e-4)
    if xl:
        pooled = encoders[1](input_ids=ids[:, 0]).text_embeds
        torch.testing.assert_close(text["pool2"], pooled, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_padding_the_states_are_those_of_the_tokens_there_are(model):
    padded = model.encode_text(CAPTIONS[:2])
    model.read_captions(TextOptions(padded=False))
    short = model.encode_text(CAPTIONS[:2])
    assert short.keys() == padded.keys()
    for name, states in short.items():
        if name.startswith("hidden"):
            assert states.shape[1] == 5  # three words between begin and end
            torch.testing.assert_close(states, padded[name][:, :5], rtol=1e-4, atol=1e-5)
    if "pool2" in short:
        torch.testing.assert_close(short["pool2"], padded["pool2"], rtol=1e-4, atol=1e-5)
    painted = model.encode_text(CAPTIONS[:2], painting=True)
    assert all(torch.equal(painted[name], padded[name]) for name in padded)


@torch.no_grad()
def test_weights_scale_the_states_and_not_the_pooled_text(model):
    weighted, plain = "a (red:1.5) circle", "a red circle"
    expected = model.encode_text([plain])
    painted = model.encode_text([weighted], painting=True)
    model.read_captions(TextOptions(weighted=True))
    trained = model.encode_text([weighted])
    for name, states in expected.items():
        if not name.startswith("hidden"):
            assert torch.equal(trained[name], states)
            assert torch.equal(painted[name], states)
            continue
        scaled = states.clone()
        scaled[:, 2] *= 1.5
        torch.testing.assert_close(trained[name], scaled)
        torch.testing.assert_close(painted[name], scaled * states.mean() / scaled.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", [1, 3])
@torch.no_grad()
def test_the_first_end_counts_though_added_words_have_larger_ids(words):
    """A Textual Inversion of several vectors: its words stand behind the vocabulary."""
    model = tiny.make_model("sdxl")
    encoder = model.text_encoders[1]
    encoder.model.resize_token_embeddings(49408 + words, mean_resizing=False)
    added = [f"sksword{number}" for number in range(words)]
    model.tokenizer_2.backend.add_tokens(added)
    caption = f"{' '.join(added)} in red"
    ids = model.tokenizer_2([caption]).ids[0, 0]
    assert ids[: words + 1].tolist() == [BEGIN, *range(49408, 49408 + words)]
    end = words + 3
    assert ids[end] == END
    pooled = encoder(ids[None, None], 2).pooled
    last = encoder.clip(input_ids=ids[None]).last_hidden_state[0]
    torch.testing.assert_close(pooled[0], encoder.model.text_projection(last[end]), rtol=1e-4, atol=1e-5)
    at_the_largest = encoder.model.text_projection(last[ids.argmax()])
    assert not torch.allclose(pooled[0], at_the_largest, atol=1e-2)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    """By their keys in the golden file."""
    return {
        name: tokenizer
        for family in FAMILIES
        for name, tokenizer in zip(TOKENS[family.name], family.tokenizers().values(), strict=True)
    }


def words_of(ids: list[list[int]]) -> list[list[int]]:
    """Without begin, end and padding."""
    return [[one for one in chunk if one not in (0, BEGIN, END)] for chunk in ids]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"{golden['max_token_length']} {golden['caption'][:20]}")
def test_golden_tokens_of_every_encoder(tokenizers, golden):
    captions, length = [golden["caption"]], golden["max_token_length"]
    weighted = golden["sd1_weighted"]
    for name, tokenizer in tokenizers.items():
        assert tokenizer(captions, length).ids.tolist() == [golden[name]]
        ids, weights = tokenizer(captions, length, weighted=True)
        wanted = torch.tensor([weighted["weights"]])
        torch.testing.assert_close(torch.ones_like(wanted) if weights is None else weights, wanted)
        assert words_of(ids[0].tolist()) == words_of(weighted["ids"])


def test_a_layer_that_sdxl_was_not_trained_with_is_said(model_files, fresh_console, capsys):
    model = load_model(model_files("sdxl"))
    for clip_skip in (None, 2):
        model.read_captions(TextOptions(clip_skip=clip_skip))
    assert "--clip_skip" not in capsys.readouterr().err
    model.read_captions(TextOptions(clip_skip=1))
    assert "--clip_skip 1: SDXL models were trained with 2" in capsys.readouterr().err
