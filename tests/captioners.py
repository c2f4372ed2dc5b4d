"""Small captioning models with random weights, in folders as those of the hub are."""

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

WORDS = (
    *("a", "picture", "of", "woman", "man", "dog", "cat", "with", "red", "blue", "hat", "on", "the", "grass"),
    *("sitting", "standing", "house", "tree", "and", "in"),
)
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "<image>")
_PAD, _UNK, _CLS, _SEP, _MASK, _DEC, _IMAGE = range(len(_SPECIAL))
_SIDE = 32
_VISION = {"image_size": _SIDE, "patch_size": 8}
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VOCABULARY = len(_SPECIAL) + len(WORDS)
_TALKATIVE = 0.4  # standard deviation of weights with which what is said depends on the picture


def save_blip(folder: Path) -> Path:
    """BLIP, in the layout of the repositories of its authors."""
    ends = {"bos_token_id": _DEC, "eos_token_id": _SEP, "sep_token_id": _SEP, "pad_token_id": _PAD}
    text = {"vocab_size": _VOCABULARY, "max_position_embeddings": 128, "encoder_hidden_size": 32, **_SMALL, **ends}
    config = BlipConfig(text_config=text, vision_config=_VISION | _SMALL, image_text_hidden_size=16)
    _save(folder, BlipForConditionalGeneration(config), "BlipImageProcessor", "BlipProcessor")
    return folder


def save_git(folder: Path) -> Path:
    ends = {"bos_token_id": _CLS, "eos_token_id": _SEP, "pad_token_id": _PAD}
    config = GitConfig(
        vision_config=_VISION | _SMALL, vocab_size=_VOCABULARY, max_position_embeddings=128, **_SMALL, **ends
    )
    _save(folder, GitForCausalLM(config), "CLIPImageProcessor", "GitProcessor")
    return folder


def save_pair(folder: Path) -> Path:
    """An encoder and a decoder with a tokenizer and an image processor that nothing joins."""
    ends = {"bos_token_id": _CLS, "eos_token_id": _SEP, "pad_token_id": _PAD}
    text = GPT2Config(vocab_size=_VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=2, **ends)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**_VISION, **_SMALL), text)
    config.decoder_start_token_id, config.pad_token_id = _CLS, _PAD
    model = VisionEncoderDecoderModel(config)
    model.generation_config.update(decoder_start_token_id=_CLS, **ends)
    _save(folder, model, "ViTImageProcessor", None)
    return folder


def save_chat(folder: Path) -> Path:
    """LLaVA, which is asked for a caption."""
    text = LlamaConfig(vocab_size=_VOCABULARY, num_key_value_heads=2, **_SMALL, bos_token_id=_CLS, eos_token_id=_SEP)
    text.pad_token_id = _PAD
    vision = CLIPVisionConfig(**_VISION, **_SMALL)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=_IMAGE, image_seq_length=16)
    _save(folder, LlavaForConditionalGeneration(config), "CLIPImageProcessor", None)
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} a{% endif %}"
    )
    processor = LlavaProcessor(
        AutoImageProcessor.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return folder


def _save(folder: Path, model: PreTrainedModel, images: str, joined: str | None) -> None:
    torch.manual_seed(len(images))
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.ndim > 1:
                weight.normal_(std=_TALKATIVE)
    model.generation_config.suppress_tokens = [_PAD, _UNK, _CLS, _MASK, _DEC, _IMAGE]
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join((*_SPECIAL, *WORDS)))
    extra = {"additional_special_tokens": ["[DEC]", "<image>"]}
    BertTokenizer(str(folder / "vocab.txt"), **extra).save_pretrained(folder)
    size = {"height": _SIDE, "width": _SIDE}
    settings = {"image_processor_type": images, "size": size, "do_resize": True, "do_center_crop": False}
    if joined:
        settings["processor_class"] = joined
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def generated(model: Path, path: Path, prompt: str | None, *, cut: int, begin: int, **settings: object) -> str:
    """What transformers makes of a picture, but for the first tokens; of the prompt the last `cut` are left out."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    pixels = AutoImageProcessor.from_pretrained(model)(Image.open(path), return_tensors="pt")
    if prompt is not None:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        pixels["input_ids"] = ids[:, : ids.shape[1] - cut]
    tokens = AutoModelForImageTextToText.from_pretrained(model).generate(**pixels, do_sample=False, **settings)
    return tokenizer.decode(tokens[0, begin:], skip_special_tokens=True)
