"""Runs that are killed at any moment and resumed until they reach their end: nothing may differ from a whole run.

The random moments come from a seed that a failure shows; KILL_SEED repeats it.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from library.data.config_values import PRESERVES
from library.training.resuming import states
from tests.fork_server import Ended
from tests.lives import Life, assert_same, assert_whole, stored
from tests.test_base_weights import write
from tests.tiny import draw_pictures
from tests.words import SEVERAL

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")

SCRIPTS = ("train_network", "fine_tune")

Kill = dict[str, object]
"""What `ForkServer.run` is told of it."""


@pytest.fixture
def compare(life):
    """`compare(kills, script, **changes)`: a run without a break beside one whose processes are killed one after the
    other by `kills`, which are made of the seconds and operations on files that the former takes.
    """

    def run(kills: Callable[[Ended], Iterable[Kill]], script: str = "train_network", **changes: object) -> list[Ended]:
        whole, broken = (life(name, script, **changes) for name in ("whole", "broken"))
        measured = whole.go_on(at=-1)
        assert measured.status == 0, measured.said
        ends = break_and_mend(broken, kills(measured))
        assert_same(whole, broken)
        return ends

    return run


def break_and_mend(broken: Life, kills: Iterable[Kill]) -> list[Ended]:
    """Run it, killed as often as that works, to its end."""
    ends = []
    for kill in (*kills, {}):
        ended = broken.go_on(**kill)
        ends.append(ended)
        assert_whole(broken)
        is_over = ended.status == 0 or (ends[1:] and f"run{states.SUFFIX} is of step" in ended.said)
        assert is_over or (kill and ended.status == -signal.SIGKILL), ended.said
        if is_over:
            break
    return ends


def chance() -> random.Random:
    seed = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(10**6))
    print(f"KILL_SEED={seed} repeats these kills")
    return random.Random(seed)


def at_random(count: int) -> Callable[[Ended], Iterator[Kill]]:
    """Kills at moments from anywhere in the run, the first one early enough to meet it on a machine that got faster."""
    drawn = chance()
    return lambda whole: ({"after": drawn.uniform(0.05, whole.seconds * (1 if n else 0.4))} for n in range(count))


def at_operations(count: int) -> Callable[[Ended], Iterator[Kill]]:
    """Kills by operations on files from anywhere in the run."""
    drawn = chance()
    return lambda whole: ({"at": drawn.randint(1, whole.operations)} for _ in range(count))


WATCHED = {"sample_every_n_steps": 3, "save_best": True, "validation_split": 0.4, "validate_every_n_steps": 2}
VARIANTS: dict[str, dict[str, object]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "ema": {"ema": True, "ema_decay": 0.9},
    "validation": WATCHED | {"sample_every_n_steps": None},
    "previews": {"sample_every_n_steps": 1, "sample_at_first": True},
    "8 bit": {"optimizer_type": "AdamW8bit"},
    "Prodigy": {"optimizer_type": "Prodigy", "learning_rate": 1},
    "schedule-free": {"optimizer_type": "AdamWScheduleFree", "optimizer_args": "warmup_steps=4"},
    "dropout": {"network_dropout": 0.3},
    "LyCORIS": {
        "network_module": "lycoris.kohya",
        "network_args": ("algo=locon", "preset=attn-mlp", "module_dropout=0.2"),
        "scale_weight_norms": 0.05,
    },
    "latents in memory": {"cache_latents": True},
    "latents on disk": {"cache_latents_to_disk": True, "vae_batch_size": 1},
    "texts in memory": {"cache_text_encoder_outputs": True, "network_train_unet_only": True},
    "texts on disk": {"cache_text_encoder_outputs_to_disk": True, "network_train_unet_only": True},
    "warm-up": {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3},
    "bf16": {"mixed_precision": "bf16"},
    "bf16 throughout": {"mixed_precision": "bf16", "full_bf16": True},
    "fused": {"fused_backward_pass": True, "optimizer_type": "AdaFactor"},
    "a rate for each part": {"optimizer_type": "DAdaptAdam", "unet_lr": 1, "text_encoder_lr": 0.5},
    "class by name": {"lr_scheduler_type": "OneCycleLR"},
    "learned timesteps": {"timestep_distribution": "loss_aware", "noise_offset": 0.1, "multires_noise_iterations": 2},
    "workers": {"max_data_loader_n_workers": 2, "color_aug": True},
    "epochs": {"save_every_n_epochs": 1, "save_last_n_epochs": 1, "save_every_n_steps": None},
    "ratio": {"save_n_epoch_ratio": 3, "save_last_n_epochs_state": 1, "save_every_n_steps": None},
}
BLOCKS = ",".join("0" if block in (1, 7) else f"{block + 1}e-4" for block in range(13))
FINE_TUNED = ("accumulation", "ema", "8 bit", "schedule-free", "bf16", "bf16 throughout", "fused", "latents on disk")
"""Variants that fine-tuning is tried in, too."""
WHOLE_MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "DreamBooth": ("train_db", {"stop_text_encoder_training": 4}),
    "DreamBooth with Prodigy": (
        "train_db",
        {"stop_text_encoder_training": 3, "optimizer_type": "Prodigy", "learning_rate": 1},
    ),
    "DreamBooth, unpadded": ("train_db", {"stop_text_encoder_training": 5, "no_token_padding": True, "ema": True}),
    "blocks": ("sdxl_train", {"block_lr": BLOCKS, "train_text_encoder": True, "learning_rate_te1": 0}),
    "blocks, fused": ("sdxl_train", {"block_lr": BLOCKS, "fused_optimizer_groups": 3}),
}
"""Scripts with variants of their own."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red circle --w 32 --h 32 --s 2 --d 1")
    return file


@pytest.fixture
def compare_variant(compare, prompts):
    """`compare`, with prompts where they are needed."""

    def run(kills: Callable[[Ended], Iterable[Kill]], script: str, changes: dict[str, object]) -> list[Ended]:
        painted = {"sample_prompts": prompts} if changes.get("sample_every_n_steps") else {}
        return compare(kills, script, **painted, **changes)

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_random_moments(compare, script):
    ends = compare(at_random(4), script)
    assert ends[0].status == -signal.SIGKILL


def test_killed_by_operations_on_files(compare_variant):
    """Among them those in the midst of writing."""
    compare_variant(at_operations(4), "train_network", WATCHED | {"ema": True, "cache_latents_to_disk": True})


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(compare_variant, name):
    compare_variant(at_random(3), "train_network", VARIANTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FINE_TUNED)
def test_variants_of_fine_tuning(compare_variant, name):
    compare_variant(at_random(3), "fine_tune", VARIANTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("kills", [at_random, at_operations])
def test_several_new_words(compare_variant, kills):
    """Each save is a folder."""
    changes = {"save_model_as": "safetensors", "caption_prefix": "mychar4", "ema": True, "learning_rate": 0.01}
    compare_variant(kills(4), "train_textual_inversion", WATCHED | SEVERAL | {"token_string": "mychar4,sks"} | changes)


@pytest.mark.slow
def test_upon_a_merged_network_with_samples_to_preserve(compare, tmp_path):
    subsets = [
        {"image_dir": str(draw_pictures(tmp_path / name, count)), "caption_extension": ".txt"}
        for name, count in (("thing", 3), ("class", 4))
    ]
    subsets[1]["custom_attributes"] = {PRESERVES: True}
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"datasets": [{"resolution": 32, "batch_size": 2, "subsets": subsets}]}))
    base = write(tmp_path / "base.safetensors")
    common = {"train_data_dir": None, "caption_extension": None, "dataset_config": data, "network_dropout": 0.3}
    compare(at_random(3), base_weights=base, base_weights_multiplier=0.5, **common)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_variants_of_whole_models(compare, model_files, name):
    script, changes = WHOLE_MODELS[name]
    model = {"pretrained_model_name_or_path": model_files("sdxl")} if script == "sdxl_train" else {}
    compare(at_random(4), script, **model, **changes)


@pytest.mark.slow
def test_resumed_three_times_in_a_row(life):
    """A run of eight steps, two at a time."""
    whole, extended = life("whole"), life("extended")
    assert whole.go_on().status == 0
    for steps in (2, 4, 6, 8):
        ended = extended.go_on(more=("--max_train_steps", str(steps)))
        assert ended.status == 0, ended.said
    assert stored(extended.output / "run.safetensors") == stored(whole.output / "run.safetensors")
    assert extended.curves() == whole.curves()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_twenty_times(compare, script, tmp_path):
    for _ in range(20):
        compare(at_random(4), script)
        for name in ("whole", "broken"):
            shutil.rmtree(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_by_every_operation_on_files(life, script, tmp_path):
    changes = {"max_train_steps": 4, "ema": True, "cache_latents_to_disk": True}
    whole = life("whole", script, **changes)
    measured = whole.go_on(at=-1)
    print(f"{measured.operations} operations")
    for operation in range(1, measured.operations + 1):
        broken = life("broken", script, **changes)
        killed, *_ = break_and_mend(broken, [{"at": operation}])
        assert killed.status == -signal.SIGKILL, operation
        assert_same(whole, broken)
        shutil.rmtree(tmp_path / "broken")
