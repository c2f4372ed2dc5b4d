import pytest
from PIL import Image

from examples.sheet import FRAME, PAPER, contact_sheet


def test_contact_sheet():
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue", "white", "black")]
    sheet = contact_sheet(pictures, ["one", "", "three " * 30, "four", "x" * 200], columns=2)
    assert sheet.mode == "RGB"
    counts = {colour: count for count, colour in sheet.getcolors(maxcolors=2**24)}
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0)):
        assert counts[colour] == 256 * 256  # all enlarged by 4, none cut off, covered or smoothed
    border = {sheet.getpixel((x, y)) for x in range(sheet.width) for y in (0, sheet.height - 1)}
    assert border == {PAPER}
    assert counts[FRAME] == 5 * 4 * 257
    assert contact_sheet(pictures[:1], [""], columns=3).width == 256 + sheet.width - 2 * 256 - 20
    assert contact_sheet([Image.new("L", (600, 400))], ["large"], columns=1).width > 600


@pytest.mark.parametrize(("count", "captions", "columns"), [(0, 0, 1), (1, 2, 1), (1, 1, 0)])
def test_contact_sheet_refuses_what_it_cannot_lay_out(count, captions, columns):
    with pytest.raises(ValueError, match="contact sheet"):
        contact_sheet([Image.new("RGB", (8, 8))] * count, [""] * captions, columns)
