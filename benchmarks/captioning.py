"""What reading the pictures costs a captioner: the tool's loop against the model alone, and one thing after another.

    python benchmarks/captioning.py [--batch_sizes N N N] [--pictures N] [--threads N] [--rounds N] [--length N]

Makes a BLIP of the base size with random weights and a folder of photographs in JPEG, and captions them with float32 on
a GPU or the CPU (where fewer pictures will do), with the likeliest words and with drawn ones. Prints the time per
picture of

- the model alone, on inputs that were made beforehand,
- finetune/make_captions.py's loop, captions written to files,
- a plain loop: decode, prepare, generate, write, one batch after another,

each as a ratio to the first; wanted of the second: at most 1.1.
"""

import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import feeding
from library import console
from library.data.decode import decode
from library.devices import fastest_device
from library.options.make_captions import MakeCaptionsOptions
from library.preprocessing.captioning.folder import find_work, make_captions
from library.preprocessing.tally import batched

with console.quiet_dependencies():
    from library.preprocessing.captioning.captioner import Captioner, Inputs, load_captioner
    from library.preprocessing.captioning.sampling import Choice


def save_model(folder: Path) -> Path:
    """BLIP as its configuration is by default: the base size, 384x384 pixels."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    folder.mkdir()
    ends = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(text_config=ends, vision_config={"image_size": 384})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "picture", "of"]
    words += [f"word{number}" for number in range(config.text_config.vocab_size - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(), BertTokenizer(str(folder / "vocab.txt"))).save_pretrained(folder)
    return folder


def read(captioner: Captioner, path: Path) -> Inputs:
    return captioner.reader(decode(path, keep_alpha=False, legacy=False)[0])


def measure(captioner: Captioner, choice: Choice, pictures: list[Path], size: int, threads: int, rounds: int) -> None:
    """Print what the three loops take with batches of a size."""
    inputs = [read(captioner, path) for path in pictures]

    def alone() -> None:
        for batch in batched(zip(pictures, inputs, strict=True), size):
            captioner.caption(choice, [path.name for path, _ in batch], [one for _, one in batch])

    def tool() -> None:
        folder = pictures[0].parent
        options = MakeCaptionsOptions(train_data_dir=folder, batch_size=size, caption_extension=".tool")
        make_captions(find_work(options, force=True), captioner, choice, options, threads)

    def one_after_another() -> None:
        for batch in batched(pictures, size):
            made = captioner.caption(choice, [path.name for path in batch], [read(captioner, path) for path in batch])
            for path, caption in zip(batch, made, strict=True):
                path.with_suffix(".plain").write_text(caption)

    captioner.caption(choice, [path.name for path in pictures[:size]], inputs[:size])  # the first run sets it up
    how = "the likeliest words" if choice.beams else "drawn words"
    loops = {"model alone": alone, "make_captions": tool, "one after another": one_after_another}
    feeding.compare(f"batches of {size}, {how}", loops, len(pictures), rounds)


def main() -> None:
    options = feeding.arguments(__doc__, length=20)
    console.setup(None)
    with tempfile.TemporaryDirectory() as place:
        pictures = feeding.save_pictures(Path(place, "pictures"), options.pictures)
        with console.quiet_dependencies():
            model = save_model(Path(place, "model"))
            captioner = load_captioner("--model_id", model, None, precision="float", device=fastest_device())
        print(f"{len(pictures)} pictures of {feeding.SIZE}, {options.threads} threads, on {captioner.place}")
        feeding.time_of_writing(Path(place))
        for beams, size in product((1, None), options.batch_sizes):
            choice = Choice(max_length=options.length, min_length=options.length, beams=beams)  # all equally long
            measure(captioner, choice, pictures, size, options.threads, options.rounds)


if __name__ == "__main__":
    main()
