"""A caption file beside each picture of a folder, by a model that is loaded only if there is something to do."""

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.console import quiet_dependencies
from library.data.decode import decode
from library.data.scanning.listing import normalised
from library.options.captioning import CaptioningOptions
from library.options.work import WorkOptions
from library.preprocessing.captioning.model_folder import find_captioner
from library.preprocessing.pictures import find_pictures, with_files_of_their_own
from library.preprocessing.tally import Tally, batched, prepared, say
from library.preprocessing.text_files import TextFiles

if TYPE_CHECKING:
    from library.preprocessing.captioning.captioner import Captioner, Inputs
    from library.preprocessing.captioning.sampling import Choice


@dataclass(frozen=True)
class Work:
    """The pictures that are to get a caption."""

    files: TextFiles
    pictures: list[Path]
    tally: Tally

    def name(self, picture: Path) -> str:
        """A picture's name among those of the folder, the same on every system."""
        name = Path(os.path.relpath(picture, self.files.folder)).as_posix()
        return normalised(name).encode("utf-8", "replace").decode()


def caption_folder(
    options: CaptioningOptions,
    work_options: WorkOptions,
    model: tuple[str, str],
    choice: Mapping[str, Any],
    *,
    prompt: str | None = None,
    finish: Callable[[str], str] = str,
) -> None:
    """Caption the pictures of a folder that have no caption yet, by the `model` (the flag that names it, and its name),
    which goes on from the `prompt`. What `finish` leaves is written; `choice` is what a Choice is made of. Says what
    has become of the pictures. UserError if nothing has.
    """
    work = find_work(options, force=work_options.force)
    place = ""
    if work.pictures:
        flag, name = model
        folder = find_captioner(flag, name)
        with quiet_dependencies():
            from library.devices import fastest_device, usable_device
            from library.preprocessing.captioning.captioner import load_captioner
            from library.preprocessing.captioning.sampling import Choice

            device = usable_device(options.device) if options.device else fastest_device()
            captioner = load_captioner(flag, folder, prompt, precision=options.precision, device=device)
        make_captions(work, captioner, Choice(**choice), options, work_options.threads, finish)
        place = captioner.place
    work.tally.tell("captions", place)


def find_work(options: CaptioningOptions, *, force: bool) -> Work:
    """The pictures without a caption file, or with `force` all. UserError if the folder has no pictures, or takes no
    files.
    """
    folder = options.train_data_dir
    files = TextFiles("captions", folder, options.caption_extension, again=force)
    pictures = find_pictures("train_data_dir", folder, recursive=options.recursive)
    pictures = with_files_of_their_own(pictures, files.extension)
    left = files.left(pictures)
    return Work(files, left, Tally(skipped=len(pictures) - len(left)))


def make_captions(
    work: Work,
    captioner: "Captioner",
    choice: "Choice",
    options: CaptioningOptions,
    threads: int,
    finish: Callable[[str], str] = str,
) -> None:
    """Write a caption for each picture of the work, as far as `finish` leaves something of it. Of captions that are
    made again those stay that an unfinished run with the same options made.
    """
    tally, files = work.tally, work.files

    def read(picture: Path) -> "Inputs":
        return captioner.reader(decode(picture, keep_alpha=False, legacy=False)[0])

    def write(picture: Path, caption: str) -> None:
        if not caption:
            tally.fail(picture, "the model has nothing to say about it")
            return
        files.write(picture, caption)
        files.done(picture)
        tally.written += 1
        if options.debug:
            say(f"{picture}: {caption}")

    with tally, files:
        pictures = files.go_on(options.purpose, work.pictures)
        tally.skipped += len(work.pictures) - len(pictures)
        size = options.batch_size
        with closing(prepared(pictures, read, tally, threads=threads, doing="captions", ahead=size)) as ready:
            for batch in batched(ready, size):
                names = [work.name(picture) for picture, _ in batch]
                captions = captioner.caption(choice, names, [inputs for _, inputs in batch])
                for (picture, _), caption in zip(batch, captions, strict=True):
                    write(picture, finish(caption))
        files.finish()
