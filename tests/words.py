"""Runs that learn new words."""

from collections.abc import Callable
from pathlib import Path

WORD = {"network_module": None, "token_string": "sks", "init_word": "red circle", "num_vectors_per_token": 3}
SEVERAL = WORD | {"token_string": "mychar4,<my/style>", "init_word": "circle", "num_vectors_per_token": 2}
SCRIPTS = {"sd1": "train_textual_inversion", "sd2": "train_textual_inversion", "sdxl": "sdxl_train_textual_inversion"}


def learner(train: Callable, flags: Callable, model_files: Callable[[str], Path]) -> Callable[..., Path]:
    """`learn(folder, family, **changes)` learns a word of three vectors, or what the changes say; returns the file, or
    the folder of several.
    """

    def learn(folder: Path, family: str = "sd1", **changes: object) -> Path:
        changes = {"pretrained_model_name_or_path": model_files(family), "learning_rate": 0.05, **WORD, **changes}
        train(flags(folder, **changes, v2=True if family == "sd2" else None), script=SCRIPTS[family])
        return folder / ("run" if "," in changes["token_string"] else f"run.{changes.get('save_model_as', 'pt')}")

    return learn
