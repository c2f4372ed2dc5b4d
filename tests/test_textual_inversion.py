"""train_textual_inversion.py and its SDXL sibling: a word is learned, saved, loaded again and painted with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.generation.paint import paint
from library.generation.prompts import parse_line
from library.generation.samplers import make_scheduler
from library.models.added_words import AddedRows, first_rows, read_embedding
from library.models.files.checkpoint import open_weights
from library.models.registry import ModelInfo, load_model
from library.models.text import VOCABULARY_SIZE, Tokenizer
from library.options import OptimizerOptions, TextualInversionOptions
from library.options.textual_inversion import file_stem
from library.training.methods.textual_inversion import TextualInversion
from tests import tiny
from tests.lives import assert_same
from tests.pipelines import picture_of, pipeline_of, pixels
from tests.tiny import draw_pictures
from tests.words import WORD, learner

WIDTHS = {"sd1": {"emb_params": 64}, "sd2": {"emb_params": 64}, "sdxl": {"clip_l": 32, "clip_g": 64}}
LINE = "a big sks, red --n blue --w 32 --h 48 --s 4 --l 5 --d 3"


@pytest.fixture
def learn(train, flags, model_files):
    return learner(train, flags, model_files)


def knowing(model, file: Path):
    """The model with the word of a file, as --weights reads it."""
    options = TextualInversionOptions(token_string="sks", num_vectors_per_token=3, weights=str(file))
    method = TextualInversion(options, OptimizerOptions(learning_rate=1.0))
    method.read_weights(model)
    model.words = method.build(model)
    return model.eval()


def tensors_in(file: Path) -> dict[str, torch.Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def load_into_sdxl(pipeline, word: str, tensors: dict[str, torch.Tensor]) -> None:
    for number, name in (("", "clip_l"), ("_2", "clip_g")):
        encoder, tokenizer = (getattr(pipeline, f"{part}{number}") for part in ("text_encoder", "tokenizer"))
        pipeline.load_textual_inversion(tensors[name], token=word, text_encoder=encoder, tokenizer=tokenizer)


@pytest.mark.parametrize(("family", "kind"), [("sd1", "pt"), ("sd2", "safetensors"), ("sdxl", "safetensors")])
def test_a_learned_word_is_the_same_in_previews_in_its_file_and_in_diffusers(
    learn, model_files, tmp_path, family, kind
):
    (tmp_path / "prompts.txt").write_text(LINE)
    previews = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 6}
    file = learn(tmp_path, family, save_model_as=kind, max_train_steps=6, **previews)
    tensors = tensors_in(file)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: (3, width) for name, width in WIDTHS[family].items()
    }
    request = parse_line(LINE)
    plain = pixels(paint(load_model(model_files(family)), request))
    ours = pixels(paint(knowing(load_model(model_files(family)), file), request))
    (preview,) = (tmp_path / "sample").glob("run_000006_00_*.png")
    assert np.abs(pixels(Image.open(preview)) - ours).max() <= 1
    assert np.abs(ours - plain).mean() > 2, "the word must be seen for its picture to be compared"

    model = load_model(model_files(family))
    pipeline = pipeline_of(model, make_scheduler("ddim", model.noise_process()))
    if family == "sdxl":
        load_into_sdxl(pipeline, "<word>", tensors)
    else:
        pipeline.load_textual_inversion(str(file), token="<word>")
    theirs = picture_of(pipeline, parse_line(LINE.replace("sks", "<word>")))
    assert np.abs(ours - theirs).mean() < 0.2


@pytest.mark.parametrize(("vectors", "kind"), [(1, "pt"), (4, "safetensors")])
@pytest.mark.parametrize("family", WIDTHS)
@torch.no_grad()
def test_the_encoders_of_diffusers_say_the_same_of_every_token(tmp_path, family, vectors, kind):
    words, prompt = ("mychar4", "<style>"), "A big mychar4, in the style of <style> and mychar4"
    model, other = tiny.make_model(family), tiny.make_model(family)
    options = TextualInversionOptions(token_string=",".join(words), num_vectors_per_token=vectors, save_model_as=kind)
    method = TextualInversion(options, OptimizerOptions(learning_rate=1.0))
    model.words = method.build(model)
    folder = method.save(tmp_path / "run", torch.float32, {})
    files = [folder / f"{file_stem(word)}.{kind}" for word in words]
    pipeline = pipeline_of(other, make_scheduler("ddim", other.noise_process()))
    if family == "sdxl":
        for word, file in zip(words, files, strict=True):
            load_into_sdxl(pipeline, word, tensors_in(file))
    else:
        pipeline.load_textual_inversion(list(map(str, files)), token=list(words))
    hidden, _, *others = pipeline.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    ours = model.encode_text([prompt], painting=True)
    pooled = ours.pop("pool2", None)
    torch.testing.assert_close(torch.cat(list(ours.values()), dim=-1), hidden)
    assert pooled is None or torch.allclose(pooled, others[0], atol=1e-5)


def test_the_file_tells_what_it_is(learn, tmp_path):
    with open_weights(learn(tmp_path, save_model_as="safetensors", max_train_steps=1, save_precision="fp16")) as file:
        file.verify()
        told, dtype = file.metadata, file.dtype("emb_params")
    assert dtype == torch.float16
    assert told["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert told["ss_token_string"] == "sks"
    assert told["ss_num_vectors_per_token"] == "3"
    assert told["ss_max_train_steps"] == "1"


def test_checkpointing_changes_nothing_and_the_average_is_saved_beside(learn, tmp_path):
    options = {"save_model_as": "safetensors", "optimizer_args": ("weight_decay=0.1",), "weighted_captions": True}
    options |= {"max_token_length": 150, "clip_skip": 1, "ema": True, "max_train_steps": 3}
    first = learn(tmp_path / "a", **options, init_word=None)
    again = learn(tmp_path / "b", **options, init_word=None, gradient_checkpointing=True)
    rows, other = (load_file(file)["emb_params"] for file in (first, again))
    assert torch.allclose(rows, other, atol=1e-4)
    average = load_file(tmp_path / "a" / "run-ema.safetensors")["emb_params"]
    assert (rows != average).any(dim=1).all()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(life):
    changes = WORD | {
        "max_train_steps": 4,
        "save_model_as": "safetensors",
        "ema": True,
        "optimizer_args": "weight_decay=0.1",
    }
    whole, broken = (life(name, "train_textual_inversion", **changes) for name in ("whole", "broken"))
    assert whole.go_on().status == 0
    assert broken.go_on(when=[("00000002-state", 9)], slow=0.1).status == -9
    ended = broken.go_on(["--init_word=square"])
    assert ended.status == 0
    assert "--init_word is square and was red circle, which has no effect" in ended.said
    assert_same(whole, broken)
    other = broken.go_on(["--num_vectors_per_token=2", "--max_train_steps=5"])
    assert other.status == 2
    assert "--num_vectors_per_token is 2 and was 3" in other.said


def test_captions_without_the_word_are_counted_and_named(learn, tmp_path, capsys):
    images = draw_pictures(tmp_path / "data" / "1_shape", 4)
    names = sorted(images.glob("*.txt"))
    names[0].write_text("a sksish circle")
    names[2].write_text("a circle\na sks circle")  # the second line is not used
    data = {"train_data_dir": tmp_path / "data", "max_train_steps": 1}
    learn(tmp_path / "out", **data)
    assert "2 of 4 captions are without sks" in capsys.readouterr().err
    for file in names:
        file.write_text("a circle")
    with pytest.raises(SystemExit):
        learn(tmp_path / "out", **data)
    assert "sks is in no caption" in capsys.readouterr().err
    learn(tmp_path / "out", **data, use_style_template=True)
    assert "captions are not used" in capsys.readouterr().err


def test_class_tokens_and_metadata_files_give_captions_like_others(learn, tmp_path, capsys):
    images = draw_pictures(tmp_path / "data" / "1_sks circle", 2)
    captions = {file.stem: {"tags": "red, sks"} for file in images.glob("*.txt")}
    for file in images.glob("*.txt"):
        file.unlink()
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    described = {"train_data_dir": images, "in_json": tmp_path / "captions.json", "caption_extension": None}
    for data in ({"train_data_dir": tmp_path / "data"}, described):
        learn(tmp_path / "out", **data, dry_run=True)
        assert "sks" not in capsys.readouterr().err.replace("the model knows sks", "")


def test_a_word_behind_the_tokens_that_are_read_is_said(learn, tmp_path, capsys):
    images = draw_pictures(tmp_path / "data" / "1_shape", 2)
    front, back = sorted(images.glob("*.txt"))
    front.write_text("sks" + " red" * 80)
    back.write_text("red " * 80 + "sks")
    data = {"train_data_dir": tmp_path / "data", "dry_run": True}
    learn(tmp_path / "out", **data)
    said = (
        "1 of 2 captions have sks behind the 75 tokens that are read, so their images teach nothing: those of 32_1.png"
    )
    assert said in capsys.readouterr().err
    learn(tmp_path / "out", **data, max_token_length=150)
    assert "behind" not in capsys.readouterr().err
    learn(tmp_path / "out", **data, shuffle_caption=True)
    assert "behind" not in capsys.readouterr().err
    front.write_text(back.read_text())
    with pytest.raises(SystemExit, match="2"):
        learn(tmp_path / "out", **data)
    assert "sks is in no caption within the 75 tokens that are read" in capsys.readouterr().err


def test_more_vectors_than_a_pass_of_the_encoder_reads(learn, tmp_path, model_file):
    many = {"num_vectors_per_token": 100, "max_token_length": 150, "init_word": "red", "save_model_as": "safetensors"}
    rows = load_file(learn(tmp_path, **many, max_train_steps=1))["emb_params"]
    known = load_model(model_file).text_encoders[0].clip.embeddings.token_embedding.weight
    assert (rows != known[Tokenizer().words("red")]).any(dim=1).all()


def test_the_page_of_the_dataset_shows_templates_and_counts_the_vectors(learn, tmp_path, capsys):
    draw_pictures(tmp_path / "regular" / "1_shape", 2)
    for number, file in enumerate((tmp_path / "regular" / "1_shape").glob("*.txt")):
        file.write_text("a sks" if number else "a shape")
    learn(tmp_path, debug_dataset=True, use_object_template=True, reg_data_dir=tmp_path / "regular")
    assert "1 regularisation image is without sks in the caption and teach" in capsys.readouterr().err
    facts = json.loads((tmp_path / "run_dataset" / "dataset.json").read_text())
    drawn = {
        is_regular: [
            drawing
            for subset in facts["subsets"]
            if subset["regularisation"] == is_regular
            for bucket in subset["buckets"]
            for card in bucket["cards"]
            for drawing in card["drawings"]
        ]
        for is_regular in (False, True)
    }
    assert {drawing["caption"] for drawing in drawn[True]} == {"a sks", "a shape"}
    drawings = drawn[False]
    assert len({drawing["caption"] for drawing in drawings}) > 3
    plain, text = Tokenizer(), [drawing["caption"] for drawing in drawings]
    assert all("sks" in caption for caption in text)
    # sks is one of CLIP's own tokens, and three here
    counts = [len(plain.words(caption)) + 2 for caption in text]
    assert [drawing["tokens"]["CLIP-L"]["count"] for drawing in drawings] == counts


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"token_string": "circle"}, "--token_string: circle is in the model's vocabulary already"),
        ({"token_string": None}, "give --token_string one that the model does not know"),
        ({"token_string": "a|b"}, "'a|b' has '|' in it"),
        ({"num_vectors_per_token": 76}, "76 vectors do not fit into the 75 tokens of a caption"),
        ({"init_word": " "}, "--init_word: there is no word in ' '"),
        ({"use_object_template": True, "use_style_template": True}, "drop one of them"),
        ({"cache_text_encoder_outputs": True}, "drop --cache_text_encoder_outputs"),
        ({"weights": "nowhere.pt"}, "--weights: nowhere.pt is no file"),
        ({"learning_rate": 0}, "--learning_rate is 0"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_a_sentence(learn, tmp_path, capsys, changes, sentence):
    with pytest.raises(SystemExit) as end:
        learn(tmp_path, **changes)
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_an_init_word_of_another_length_is_repeated_or_cut(learn, tmp_path, capsys, model_file):
    known = load_model(model_file).text_encoders[0].clip.embeddings.token_embedding.weight
    tokenizer = load_model(model_file).own_tokenizers[0]
    words = tokenizer.words("red circle square")
    assert torch.equal(first_rows(torch.nn.Embedding.from_pretrained(known), words, 5), known[[*words, *words[:2]]])
    learn(tmp_path, init_word="red circle square", num_vectors_per_token=2, max_train_steps=1)
    assert "--init_word red circle square has 3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tensor", "parameters"])
def test_the_web_uis_files_are_read(tmp_path, kind):
    vectors = torch.randn(2, 64)
    inside = {"*": vectors} if kind == "tensor" else torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    content = {"string_to_token": {"*": 265}, "string_to_param": inside, "name": "sks", "step": 100}
    torch.save(content | {"sd_checkpoint": None, "sd_checkpoint_name": None}, tmp_path / "sks.pt")
    assert torch.equal(read_embedding(tmp_path / "sks.pt", {"emb_params": 64})["emb_params"], vectors)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("family", WIDTHS)
def test_files_of_diffusers_are_read(tmp_path, family, suffix):
    """They have the word where there is one encoder, and a single vector may be no row."""
    vectors = {name: torch.randn(width) for name, width in WIDTHS[family].items()}
    named = vectors if len(vectors) > 1 else {"<cat-toy>": vectors["emb_params"]}
    (save_file if suffix == ".safetensors" else torch.save)(named, tmp_path / f"word{suffix}")
    found = read_embedding(tmp_path / f"word{suffix}", WIDTHS[family])
    assert all(torch.equal(found[name], vectors[name][None]) for name in vectors)


def test_files_for_other_models_are_refused(tmp_path):
    save_file({"emb_params": torch.zeros(2, 32)}, tmp_path / "small.safetensors")
    with pytest.raises(UserError, match="have 32 values, and those of this model have 64"):
        read_embedding(tmp_path / "small.safetensors", {"emb_params": 64})
    with pytest.raises(UserError, match="there should be clip_l and clip_g in it"):
        read_embedding(tmp_path / "small.safetensors", {"clip_l": 32, "clip_g": 64})


def test_vectors_to_start_from_are_read_before_the_model_and_not_by_a_resumed_run(learn, tmp_path, capsys, monkeypatch):
    start = tmp_path / "start.safetensors"
    save_file({"emb_params": torch.full((3, 64), 0.5)}, start)
    changes = {"init_word": None, "weights": start, "save_state": True, "save_model_as": "safetensors"}
    with monkeypatch.context() as patch:
        patch.setattr(ModelInfo, "load", None)  # so that nothing can be loaded
        with pytest.raises(SystemExit, match="2"):
            learn(tmp_path, **changes | {"num_vectors_per_token": 2})
    assert "start.safetensors has 3 vectors, not 2: give --num_vectors_per_token 3" in capsys.readouterr().err
    still = load_file(learn(tmp_path, **changes, max_train_steps=1, learning_rate=1e-9))["emb_params"]
    assert torch.allclose(still, torch.full((3, 64), 0.5), atol=1e-3)
    start.unlink()
    learn(tmp_path, **changes, max_train_steps=2, resume="latest", learning_rate=1e-9)
    assert torch.allclose(load_file(tmp_path / "run.safetensors")["emb_params"], still, atol=1e-3)


def test_new_rows_are_looked_up_behind_the_table_and_alone_get_gradients():
    table = torch.nn.Embedding(VOCABULARY_SIZE, 4)
    rows, plain = AddedRows(torch.ones(2, 4)), table.weight.detach().clone()
    rows.extend(table.requires_grad_(False))
    vectors = table(torch.tensor([[3, VOCABULARY_SIZE + 1, 5]]))
    assert torch.equal(vectors[0], torch.stack([plain[3], torch.ones(4), plain[5]]))
    vectors.sum().backward()
    assert rows.rows.grad.tolist() == [[0.0] * 4, [1.0] * 4]
    rows.rows.grad = None
    table(torch.tensor([[3, 5]])).sum().backward()
    assert not rows.rows.grad.any()
    assert list(table.state_dict()) == ["weight"]
