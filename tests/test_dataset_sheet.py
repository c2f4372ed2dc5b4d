"""The dataset sheet: what --debug_dataset shows of the data before anything is trained."""

import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from library.data import captions, images
from library.data.plan import RunPlan
from library.data.records import geometry_of, scan
from library.data.report.sheet import choose, write_sheet
from library.errors import UserError
from library.randomness import generator
from tests.pictures import dataset, picture, subset

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The tags of a page and its texts; fails where they are not nested."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.texts, self.pictures = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.pictures += [dict(attributes)["src"]] if tag == "img" else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((data, tuple(self.open)))

    def text(self, inside=None):
        return " ".join(text for text, where in self.texts if inside is None or inside in where)


def count_words(caption):
    """As if each word was a token, and six of them too many for the second encoder."""
    words = caption.split(" ")
    return {"one": (len(words), ""), "two": (len(words), " ".join(words[5:]))}


def sheet_of(folder, *datasets, total_steps=100, **options):
    table = scan(datasets)
    plan = RunPlan(table, datasets, seed=3)
    path = write_sheet(folder, table, datasets, plan, count_words, total_steps=total_steps, **options)
    return table, plan, Page(path), json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def cards_of(facts):
    return [card for subset in facts["subsets"] for bucket in subset["buckets"] for card in bucket["cards"]]


def test_it_shows_what_training_draws(tmp_path):
    for number in range(8):
        picture(tmp_path / "a" / f"{number}.png", (96, 64), ", ".join(f"tag{tag} of {number}" for tag in range(6)))
    data = dataset(subset(tmp_path / "a", num_repeats=2, shuffle_caption=True, keep_tokens=1, flip_aug=True))
    table, plan, page, facts = sheet_of(tmp_path / "sheet", data)
    expected = {}
    for batch in plan.iterate(0, 3 * plan.steps_per_epoch):
        for item in batch.items:
            expected.setdefault((item.record, batch.epoch), (item, batch.step))
    for record, card in zip(table, cards_of(facts), strict=True):
        options = data.subsets[0]
        for drawing in card["drawings"]:
            item, step = expected[record.index, drawing["epoch"]]
            drawn = captions.compose(record.caption, options.captions, rng=generator(item.seed, "caption"))
            assert (drawing["caption"], drawing["step"]) == (drawn, step)
        epochs = []
        for shown in card["pictures"]:
            for epoch in shown["epochs"]:
                rng = generator(expected[record.index, epoch][0].seed, "augment")
                seen = images.example(record.path, geometry_of(record, data.buckets()), options.images, rng)
                assert np.array_equal(np.asarray(Image.open(tmp_path / "sheet" / shown["image"])), seen.image)
                assert seen.flipped == shown["flipped"]
            epochs += shown["epochs"]
        assert sorted(epochs) == [drawing["epoch"] for drawing in card["drawings"]] == [1, 2, 3]
    assert {len(card["pictures"]) for card in cards_of(facts)} == {1, 2}
    assert "tag" in page.text("mark")
    assert "tag0" not in page.text("mark")  # the kept tag is never among what has moved
    assert all(os.path.exists(tmp_path / "sheet" / name) for name in page.pictures)


def test_any_caption_is_shown_as_it_is(tmp_path):
    odd = '<script>alert("x")</script> & {{a}} שלום 🐶 <b>'
    picture(tmp_path / "a" / "0 <i> & é.png", caption=odd)
    picture(tmp_path / "a" / "1.png", caption="")
    _, _, page, facts = sheet_of(tmp_path / "sheet", dataset(subset(tmp_path / "a", class_tokens='"><script>')))
    assert not {"script", "b", "i"} & set(page.tags[page.tags.index("section") :])
    # each caption in one piece, but for where it is cut off
    assert odd.replace(" ", "") in page.text("bdi").replace(" ", "")
    assert "empty caption" in page.text("span")
    assert cards_of(facts)[0]["caption"] == odd


def test_the_end_that_does_not_fit_is_struck_through(tmp_path):
    picture(tmp_path / "a" / "0.png", caption="one two three four five six seven")
    picture(tmp_path / "a" / "1.png", caption="short")
    _, _, page, facts = sheet_of(tmp_path / "sheet", dataset(subset(tmp_path / "a")))
    assert page.text("s") == "six seven"
    tokens = cards_of(facts)[0]["drawings"][0]["tokens"]
    assert tokens == {"one": {"count": 7, "cut": ""}, "two": {"count": 7, "cut": "six seven"}}
    (problem,) = facts["problems"]
    assert problem["files"] == ["0.png"]


def test_masks_are_laid_over_the_picture(tmp_path):
    picture(tmp_path / "a" / "0.png", caption="half")
    half = np.zeros((64, 64), dtype=np.uint8)
    half[:, :32] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(half).save(tmp_path / "masks" / "0.png")
    data = dataset(subset(tmp_path / "a", conditioning_data_dir=tmp_path / "masks"))
    _, _, page, facts = sheet_of(tmp_path / "sheet", data, masked_loss=True)
    (shown,) = cards_of(facts)[0]["pictures"]
    assert shown["mask_area"] == 0.5
    plain, tinted = (np.asarray(Image.open(tmp_path / "sheet" / shown[name])) for name in ("image", "mask"))
    assert np.array_equal(plain[:, :32], tinted[:, :32])
    assert (plain[:, 32:] != tinted[:, 32:]).any(axis=2).all()
    assert page.pictures == [shown["image"], shown["mask"]]
    _, _, page, facts = sheet_of(tmp_path / "sheet", data)  # an earlier sheet's pictures do not stay
    assert [path.name for path in (tmp_path / "sheet" / "pictures").iterdir()] == [os.path.basename(page.pictures[0])]
    assert "--masked_loss" in facts["problems"][0]["what"]


def test_masks_that_do_not_fit_their_images_are_named(tmp_path):
    for number in range(2):
        picture(tmp_path / "a" / f"{number}.png", caption="x")
        picture(tmp_path / "masks" / f"{number}.png", (32, 32 << number))
    data = dataset(subset(tmp_path / "a", conditioning_data_dir=tmp_path / "masks"))
    _, _, page, facts = sheet_of(tmp_path / "sheet", data, masked_loss=True)
    (problem,) = facts["problems"]
    assert problem["what"] == "1 mask of other proportions than its image, and distorted"
    assert (problem["where"], problem["files"]) == ("a", ["1.png"])
    assert "1.png" in page.text()


def test_what_is_wrong_is_listed_first(tmp_path):
    picture(tmp_path / "a" / "good.png", caption="fine")
    picture(tmp_path / "a" / "plain.png")
    cut = picture(tmp_path / "a" / "cut.png", caption="fine")
    cut.write_bytes(cut.read_bytes()[:3000])
    (tmp_path / "a" / "empty.png").touch()
    picture(tmp_path / "reg" / "0.png", (96, 64))
    data = dataset(
        subset(tmp_path / "a", class_tokens="dog"),
        subset(tmp_path / "reg", is_reg=True),
        batch_size=8,
        resolution=(64, 64),
    )
    _, _, page, facts = sheet_of(tmp_path / "sheet", data)
    problems = {problem["what"]: problem for problem in facts["problems"]}
    (unreadable,) = (problem for what, problem in problems.items() if "cannot be read" in what)
    assert (unreadable["where"], unreadable["files"]) == ("a", ["empty.png"])
    assert "1 image without a caption, trained with “dog”" in problems
    assert any(problem["where"] == "cut.png" for problem in facts["problems"])
    assert any(problem["where"] == "bucket 64x64" for problem in facts["problems"])
    assert "plain.png" in page.text()
    places = [page.text().index(text) for text in ("cannot be read", "In numbers", "uses per epoch, class tokens")]
    assert places == sorted(places)


def test_the_choice_is_even(tmp_path):
    for number in range(20):
        picture(tmp_path / "a" / f"{number:02}.png", (64, 64))
    for number in range(3):
        picture(tmp_path / "a" / f"wide{number}.png", (96, 64))
        picture(tmp_path / "b" / f"{number}.png", (64, 64))
    datasets = [dataset(subset(tmp_path / "a"), subset(tmp_path / "b"))]
    table = scan(datasets)
    assert [os.path.basename(table[i].path) for i in choose(table, 9)] == [
        *("03.png", "10.png", "16.png"),
        *("wide0.png", "wide1.png", "wide2.png"),
        *("0.png", "1.png", "2.png"),
    ]
    assert len(choose(table, 100)) == len(table) == 26
    assert len({tuple(table.buckets[i]) for i in choose(table, 2)}) == 2
    _, _, page, facts = sheet_of(tmp_path / "sheet", *datasets, limit=9)
    assert (facts["shown"], facts["images"]) == (9, 26)
    assert "Shows 9 of 26 images in use, an even choice" in page.text("p")


def test_images_that_wait_for_their_turn_are_shown_too(tmp_path):
    for number in range(10):
        picture(tmp_path / "a" / f"{number}.png", caption="x")
    data = dataset(subset(tmp_path / "a", num_repeats=0.2, flip_aug=True))
    _, _, page, facts = sheet_of(tmp_path / "sheet", data, epochs=2)
    cards = cards_of(facts)
    assert [len(card["pictures"]) for card in cards] == [1] * 10
    assert sum(len(card["drawings"]) for card in cards) == 4
    assert page.text("figcaption").count("not used in these epochs") == 6


def test_what_moved_is_compared_with_a_caption_that_was_drawn(tmp_path):
    for number in range(8):
        picture(tmp_path / "a" / f"{number}.png", caption="one, two, three")
    data = dataset(subset(tmp_path / "a", caption_dropout_rate=0.5))
    _, _, page, facts = sheet_of(tmp_path / "sheet", data)
    assert any(card["drawings"][0]["caption"] == "" != card["drawings"][1]["caption"] for card in cards_of(facts))
    assert "mark" not in page.tags


def test_an_interrupted_sheet_leaves_no_page_of_an_earlier_one(tmp_path):
    picture(tmp_path / "a" / "0.png", caption="x")
    data = dataset(subset(tmp_path / "a"))
    table, plan, _, _ = sheet_of(tmp_path / "sheet", data)

    def interrupt(caption):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sheet(tmp_path / "sheet", table, [data], plan, interrupt, total_steps=1)
    assert not (tmp_path / "sheet" / "index.html").exists()


def test_only_epochs_that_the_run_has(tmp_path):
    picture(tmp_path / "a" / "0.png", caption="x")
    _, _, page, facts = sheet_of(tmp_path / "sheet", dataset(subset(tmp_path / "a")), total_steps=2)
    assert facts["epochs"] == 2
    assert "in epochs 1–2" in page.text("p")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    picture(tmp_path / "a" / "0.png", caption="x")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: the dataset sheet cannot be written"):
        sheet_of(tmp_path / "file", dataset(subset(tmp_path / "a")))
