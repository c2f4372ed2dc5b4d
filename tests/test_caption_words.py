"""How words of captions are drawn, and which are left out."""

import time

import pytest

from library.preprocessing.captioning.remarks import without_remarks
from tests.processes import python


def test_draws_have_the_chances_of_the_model():
    import torch

    from library.preprocessing.captioning.sampling import AddressedDraw

    chances = torch.tensor([0.5, 0.0, 0.3, 0.2])
    draw = AddressedDraw(1, [f"{number}.png" for number in range(2000)], 1.0, 50, 1.0)
    for _ in range(2):
        drawn = draw(torch.zeros(2000, 1), chances.log().expand(2000, 4)).argmax(dim=1)
        shares = torch.bincount(drawn, minlength=4) / 2000
        assert shares[1] == 0
        assert (shares - chances).abs().max() < 0.04


def test_words_are_drawn_from_the_likeliest_that_suffice():
    import torch

    from library.preprocessing.captioning.sampling import AddressedDraw

    equal = torch.tensor([0.1, 0.05, 0.4, 0.1, 0.05, 0.3])
    different = torch.tensor([0.1, 0.05, 0.4, 0.12, 0.03, 0.3])
    scores = torch.stack((equal, different)).log().to(torch.bfloat16).repeat(500, 1)

    def drawn(top_k: int, top_p: float) -> tuple[set[int], set[int]]:
        draw = AddressedDraw(1, [f"{number}.png" for number in range(1000)], 1.0, top_k, top_p)
        tokens = draw(torch.zeros(1000, 1), scores).argmax(dim=1)
        return set(tokens[::2].tolist()), set(tokens[1::2].tolist())

    assert drawn(2, 1) == ({2, 5}, {2, 5})
    assert drawn(3, 1) == ({0, 2, 3, 5}, {2, 3, 5})  # equals belong together
    assert drawn(99, 1) == ({*range(6)}, {*range(6)})
    assert drawn(99, 0.6) == drawn(4, 0.6) == ({2, 5}, {2, 5})
    assert drawn(99, 1e-6) == ({2}, {2})


def test_nothing_heavy_is_imported_before_the_flags_are_read():
    code = """
        import sys
        import finetune.make_captions, finetune.make_captions_by_git
        assert not {"torch", "transformers", "huggingface_hub"} & sys.modules.keys()
    """
    assert python(code).returncode == 0


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ('a mug with the words " hello world " on it', "a mug"),
        ('a poster of a man that says " the end', "a poster of a man"),
        ("a book called 'x y' and \"z\" on a table", "a book on a table"),
        ("a woman with the number 23 on her shirt standing in a park", "a woman standing in a park"),
        ("a cat, with the word love on the cover of a magazine", "a cat"),
        ('a red shirt with the word "love" on it, and a blue hat', "a red shirt, and a blue hat"),
        ("A SHIRT WITH THE WORDS “NO” ACROSS THE FRONT", "A SHIRT"),
        ("a girl with blue eyes and writing on her arm", "a girl with blue eyes"),
        ('the words "a" and "b"', ""),
        ("a man with the words no entry on the door", "a man"),
        ("a shirt with number 7 on the back", "a shirt"),
        ("a page with text. a hat", "a page. a hat"),
        ("a sign that says stop", "a sign"),
        ("a sign which says stop on it in a street", "a sign in a street"),
        ("a bus with number plates on the road", None),
        ("a bus with the number plate of a car on it", None),
        ("a girl showing text messages on her phone", None),
        ("a city with writing desks in the room", None),
        ("a boy and his letter box in the garden", None),
        ("a woman's hat and a man's dog", None),
        ("a man with a name tag on his chest", None),
        ("a girl with a letter in her hand", None),
        ("a person reading a book in the park", None),
        ("a street with a number of people", None),
    ],
)
def test_remarks(caption, left):
    assert without_remarks(caption) == (caption if left is None else left)


@pytest.mark.parametrize("words", ["and ", "that says ", "with words and ", '" and ', "    "])
def test_endless_captions_take_no_endless_time(words):
    start = time.perf_counter()
    without_remarks(words * 5000 + "x")
    assert time.perf_counter() - start < 2
