"""What is to be trained on: dataset file, folder convention or metadata file -> one DatasetConfig per dataset."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from library.console import notice, warn
from library.data import captions, images
from library.data.buckets import Buckets, Size
from library.data.captions import CaptionOptions
from library.data.config_file import DatasetTable, SubsetTable, read_dataset_file
from library.data.config_values import DREAMBOOTH_ONLY, OF_DATASET, OF_GENERAL, PRESERVES, Values, flag, from_flag
from library.data.folders import image_folders
from library.data.images import ImageOptions
from library.errors import UserError
from library.options.cache import CacheOptions
from library.options.dataset import DatasetOptions

DREAMBOOTH, FINETUNING = "dreambooth", "finetuning"
BOTH_KINDS = frozenset({DREAMBOOTH, FINETUNING})


@dataclass(frozen=True)
class SubsetConfig:
    """One folder of images, or one metadata file, and how it is trained on."""

    image_dir: Path | None
    """None: the metadata file's keys are full paths."""
    metadata_file: Path | None = None
    """A fine-tuning subset: its captions are in this file. None: a DreamBooth subset, with caption files."""
    class_tokens: str = ""
    caption_extension: str = ".caption"
    is_reg: bool = False
    cache_info: bool = False
    """Keep an index of sizes and captions in image_dir."""
    num_repeats: float = 1
    """Times that each image is used per epoch; 2.5: each twice, and half of them, others each time, once more."""
    images_per_epoch: int | None = None
    """Uses per epoch of all images together, in place of num_repeats; others come in turn."""
    weight: float = 1.0
    """Factor of the loss."""
    conditioning_data_dir: Path | None = None
    """Folder of masks (or control images) with the stems of the images."""
    validation_split: float = 0.0
    """Share of the images that is held out."""
    validation_seed: int | None = None
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)
    """Whatever the user wants to have in the batch; `PRESERVES` has a meaning here."""
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    place: str = field(default="", compare=False)
    """Where a dataset file describes it, for messages: `my.toml: datasets[0].subsets[1]`."""

    def where(self, name: str) -> str:
        """How a message refers to one of this subset's options."""
        return f"{self.place}.{name}" if self.place else flag(name)

    @property
    def is_preserved(self) -> bool:
        """Whether its samples are to keep what the model says of them."""
        return bool(self.custom_attributes.get(PRESERVES))

    @property
    def name(self) -> str:
        """The folder's own name: what files that are passed on may say of where the data was."""
        return os.path.basename(os.path.abspath(self.image_dir or self.metadata_file))


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets that share a resolution and are mixed in batches; all DreamBooth, or all fine-tuning."""

    resolution: Size | None
    """None: every entry of its metadata files must have its train_resolution."""
    batch_size: int
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    subsets: tuple[SubsetConfig, ...]
    skip_image_resolution: Size | None = None
    """Images of no more than this area are left out."""
    network_multiplier: float = 1.0
    place: str = field(default="", compare=False)

    @property
    def kind(self) -> str:
        """DREAMBOOTH: captions beside the images. FINETUNING: captions in metadata files."""
        return FINETUNING if any(subset.metadata_file for subset in self.subsets) else DREAMBOOTH

    def buckets(self) -> Buckets:
        """The bucket arithmetic for this dataset's images. Without a resolution nothing can be chosen with it: each
        image's bucket is the train_resolution of its metadata.
        """
        if self.resolution is None:
            return Buckets((self.bucket_reso_steps, self.bucket_reso_steps), enabled=False)
        return Buckets(
            self.resolution,
            enabled=self.enable_bucket,
            min_size=self.min_bucket_reso,
            max_size=self.max_bucket_reso,
            step=self.bucket_reso_steps,
            no_upscale=self.bucket_no_upscale,
        )

    def where(self, name: str) -> str:
        """How a message refers to one of this dataset's options."""
        return f"{self.place}.{name}" if self.place else flag(name)


def load_datasets(
    options: DatasetOptions, given: frozenset[str], kinds: frozenset[str] = BOTH_KINDS
) -> tuple[DatasetConfig, ...]:
    """The datasets of a run; `given` names the flags that the user set, `kinds` what the script can train on.

    Raises UserError for whatever can be known without looking at the images.
    """
    values = _command_line(options)
    if options.dataset_config is not None:
        used = f"--dataset_config {options.dataset_config} describes the datasets"
        _say_unused(("train_data_dir", "reg_data_dir", "in_json"), options, given, used)
        datasets = tuple(map(_from_table, read_dataset_file(options.dataset_config, values)))
        for dataset in datasets:
            _check_kind(dataset.kind, kinds, dataset.place)
    elif options.in_json:
        _check_kind(FINETUNING, kinds, "--in_json")
        _say_unused(("reg_data_dir",), options, given, "there are no regularisation images with --in_json")
        datasets = (_from_metadata(options, values),)
    elif options.train_data_dir:
        _check_kind(DREAMBOOTH, kinds, "--train_data_dir without --in_json")
        datasets = (_from_folders(options, values),)
    else:
        source = "--train_data_dir" if DREAMBOOTH in kinds else "--in_json"
        raise UserError(f"nothing to train on: give {source}, or --dataset_config with a dataset file")
    _check_masks(datasets, options.masked_loss)
    return datasets


def check_resolutions(datasets: Sequence[DatasetConfig], step: int) -> None:
    """Raises UserError if a dataset makes images whose sides are not multiples of the model's `step` (pixels).

    Sizes that metadata files ask for are not known here.
    """

    def nearest(length: int) -> int:
        return max(step, (length + step // 2) // step * step)

    for dataset in datasets:
        if dataset.resolution is None:
            continue
        right = tuple(nearest(length) for length in dataset.resolution)
        if right != dataset.resolution:
            raise UserError(
                f"{dataset.where('resolution')}: {_sides(dataset.resolution)} does not fit this model, which needs "
                f"multiples of {step}, the nearest is {_sides(right)}"
            )
        if dataset.enable_bucket and dataset.bucket_reso_steps % step:
            raise UserError(
                f"{dataset.where('bucket_reso_steps')}: {dataset.bucket_reso_steps} does not fit this model, which "
                f"needs a multiple of {step}, the nearest is {nearest(dataset.bucket_reso_steps)}"
            )


def check_combinations(datasets: Sequence[DatasetConfig], cache: CacheOptions, trains_text_encoder: bool) -> None:
    """Raises UserError if something is to be cached that is different each time it is used."""
    latents_flag = "--cache_latents" + ("_to_disk" if cache.cache_latents_to_disk else "")
    text_flag = "--cache_text_encoder_outputs" + ("_to_disk" if cache.cache_text_encoder_outputs_to_disk else "")
    if cache.text and trains_text_encoder:
        raise UserError(
            f"{text_flag}: what a text encoder puts out changes while it is trained: train the U-Net alone, "
            f"with networks by --network_train_unet_only, or drop {text_flag}"
        )
    for subset in (subset for dataset in datasets for subset in dataset.subsets):
        varying = images.varies(subset.images)
        if cache.latents and varying:
            raise UserError(
                f"{subset.where(varying)}: makes images different each time, so that they cannot be cached: drop it or "
                f"{latents_flag}"
            )
        varying = captions.varies(subset.captions)
        if cache.text and varying:
            raise UserError(
                f"{subset.where(varying)}: makes captions different each time, so that they cannot be cached: drop it "
                f"or {text_flag}"
            )


def _check_kind(kind: str, kinds: frozenset[str], where: str) -> None:
    if kind in kinds:
        return
    if kind == DREAMBOOTH:
        raise UserError(
            f"{where}: this script takes its captions from metadata files: give --in_json (metadata_file in a dataset "
            "file), or use train_db.py for folders of images and caption files"
        )
    raise UserError(
        f"{where}: this script takes no metadata files: use fine_tune.py for them, or folders of images and "
        "caption files"
    )


def preserved_subset(datasets: Sequence[DatasetConfig]) -> SubsetConfig | None:
    """The first whose samples are to keep what the model says of them."""
    return next((subset for dataset in datasets for subset in dataset.subsets if subset.is_preserved), None)


def with_alpha_masks(datasets: Sequence[DatasetConfig]) -> bool:
    """Whether the transparency of some images is their mask."""
    return any(subset.images.alpha_mask for dataset in datasets for subset in dataset.subsets)


def _check_masks(datasets: Sequence[DatasetConfig], masked_loss: bool) -> None:
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    folders = [subset for subset in subsets if subset.conditioning_data_dir]
    if masked_loss and not folders and not with_alpha_masks(datasets):
        raise UserError(
            "--masked_loss: there are no masks: give --conditioning_data_dir their folder, or --alpha_mask if they are "
            "the transparency of the images, or set one of the two in the dataset file"
        )
    if folders and not masked_loss:
        warn(f"{folders[0].where('conditioning_data_dir')}: masks are not used without --masked_loss")


def _say_unused(names: Iterable[str], options: DatasetOptions, given: frozenset[str], reason: str) -> None:
    unused = [f"--{name}" for name in names if name in given and getattr(options, name)]
    if unused:
        notice(f"{' and '.join(unused)} ignored: {reason}")


def _command_line(options: DatasetOptions) -> Values:
    """What holds where a dataset file says nothing."""
    values = {}
    for name in OF_GENERAL:
        value = getattr(options, flag(name).removeprefix("--"), None)  # some options have no flag
        if value is not None:
            values[name] = from_flag(name, value)
    return values


def _from_folders(options: DatasetOptions, values: Values) -> DatasetConfig:
    roots = [("train_data_dir", options.train_data_dir, False), ("reg_data_dir", options.reg_data_dir, True)]
    subsets = []
    for name, root, is_reg in roots:
        for folder in image_folders(root, f"--{name}") if root else ():
            own = {"image_dir": folder.path, "class_tokens": folder.class_tokens, "is_reg": is_reg}
            subsets.append(_subset(SubsetTable("", {}, {**values, **own, "num_repeats": folder.repeats})))
    return _dataset(values, subsets, place="")


def _from_metadata(options: DatasetOptions, values: Values) -> DatasetConfig:
    """--in_json: one fine-tuning subset."""
    own = {"metadata_file": from_flag("metadata_file", options.in_json)}
    if options.train_data_dir:
        own["image_dir"] = from_flag("image_dir", options.train_data_dir)
    return _dataset(values, [_subset(SubsetTable("", own, {**values, **own}))], place="")


def _from_table(table: DatasetTable) -> DatasetConfig:
    """A dataset of the dataset file, without subsets that count for nothing."""
    _check_one_kind(table)
    subsets, seen = [], set()
    for subset_table in table.subsets:
        subset = _subset(subset_table)
        source = subset.metadata_file or subset.image_dir
        identity = os.path.normcase(os.path.realpath(source))
        if identity in seen:
            notice(f"{subset.place} is left out: its dataset has {source} already")
        elif subset.num_repeats == 0 and subset.images_per_epoch is None:
            notice(f"{subset.place} is left out: its num_repeats is 0")
        else:
            seen.add(identity)
            subsets.append(subset)
    return _dataset(table.values, subsets, table.place)


def _check_one_kind(table: DatasetTable) -> None:
    of_metadata = ["metadata_file" in subset.own for subset in table.subsets]
    if len(set(of_metadata)) > 1:
        odd = of_metadata.index(not of_metadata[0])
        raise UserError(
            f"{table.subsets[odd].place}: has {'a' if of_metadata[odd] else 'no'} metadata_file, unlike those before "
            "it, and a dataset cannot mix the two: move it to [[datasets]] of its own"
        )
    if of_metadata[0]:
        _refuse(DREAMBOOTH_ONLY, table.own, table.place, "the subsets' metadata_file has the captions")


def _refuse(names: Iterable[str], own: Values, place: str, reason: str) -> None:
    for name in names:
        if own.get(name):
            raise UserError(f"{place}.{name}: does not apply here, {reason}: leave it out")


def _subset(table: SubsetTable) -> SubsetConfig:
    values = _applicable(table)
    if "metadata_file" not in values and "image_dir" not in values:
        raise UserError(
            f"{table.place}: image_dir, the folder of its images, is missing (or metadata_file, a file of captions)"
        )

    def group(kind: type) -> Any:
        return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})

    own = {f.name: values[f.name] for f in fields(SubsetConfig) if f.name in values}
    own |= {"captions": group(CaptionOptions), "images": group(ImageOptions)}
    return SubsetConfig(**({"image_dir": None} | own), place=table.place)


def _applicable(table: SubsetTable) -> Values:
    """Its values without those inherited ones that mean nothing for its kind. Such values of its own are refused."""
    if "metadata_file" in table.own:
        _refuse(DREAMBOOTH_ONLY, table.own, table.place, "metadata_file has the captions")
        return {name: value for name, value in table.values.items() if name not in DREAMBOOTH_ONLY}
    if not table.values.get("is_reg"):
        return table.values
    names = ("images_per_epoch", "validation_split")
    _refuse(names, table.own, table.place, "regularisation images are used as often as there are training images")
    repeats = table.values.get("num_repeats", 1)
    if repeats != int(repeats):
        raise UserError(
            f"{table.place}.num_repeats: {repeats} does not fit regularisation images, which need a whole number: set "
            f"num_repeats = {max(1, round(repeats))} there"
        )
    return {name: value for name, value in table.values.items() if name not in names}


def _dataset(values: Values, subsets: list[SubsetConfig], place: str) -> DatasetConfig:
    own = {name: values[name] for name in OF_DATASET if name in values}
    dataset = DatasetConfig(**({"resolution": None} | own), subsets=tuple(subsets), place=place)
    if dataset.resolution is None and dataset.kind == DREAMBOOTH:
        where = f"{place}.resolution is missing: set it there or" if place else "the training resolution is missing:"
        raise UserError(f"{where} give --resolution, as --resolution=512")
    return with_whole_steps(dataset) if dataset.enable_bucket and not dataset.bucket_no_upscale else dataset


def with_whole_steps(dataset: DatasetConfig) -> DatasetConfig:
    """The smallest and largest bucket side moved outwards to whole steps, and compared with the resolution."""
    step = dataset.bucket_reso_steps
    low = max(step, dataset.min_bucket_reso // step * step)
    high = -(-dataset.max_bucket_reso // step) * step
    for name, used in (("min_bucket_reso", low), ("max_bucket_reso", high)):
        asked = getattr(dataset, name)
        if asked != used:
            notice(f"{dataset.where(name)}: {used} instead of {asked} is used, a multiple of bucket_reso_steps {step}")
    if low > high:
        raise UserError(f"{dataset.where('min_bucket_reso')}: {low} is more than max_bucket_reso, which is {high}")
    if dataset.resolution is None:
        return replace(dataset, min_bucket_reso=low, max_bucket_reso=high)
    if step > min(dataset.resolution):
        raise UserError(
            f"{dataset.where('bucket_reso_steps')}: {step} is more than the resolution {_sides(dataset.resolution)}, "
            f"use {min(dataset.resolution)} or less, or a larger resolution"
        )
    if low > min(dataset.resolution):
        raise UserError(
            f"{dataset.where('min_bucket_reso')}: {low} is more than the resolution {_sides(dataset.resolution)}, "
            f"use {min(dataset.resolution)} or less"
        )
    if high < max(dataset.resolution):
        raise UserError(
            f"{dataset.where('max_bucket_reso')}: {high} is less than the resolution {_sides(dataset.resolution)}, "
            f"use {max(dataset.resolution)} or more"
        )
    return replace(dataset, min_bucket_reso=low, max_bucket_reso=high)


def _sides(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]},{size[1]}"
