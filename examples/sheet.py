"""Contact sheets: pictures in a labelled grid, to be looked at side by side."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CELL = 256  # pixels; smaller pictures are enlarged by a whole factor to about this size
GAP = 20  # between cells
MARGIN = 28
FONT_SIZE = 15
LINE_HEIGHT = 20
CAPTION_GAP = 8  # between a picture and its caption
PAPER = (255, 255, 255)
INK = (40, 40, 46)
FRAME = (214, 214, 220)


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """Put pictures into a white grid of `columns`, row by row, each with its caption below.

    Small pictures are enlarged without smoothing, all by the same factor; captions wrap at the width of a cell. There
    must be one caption, maybe empty, for each picture, and at least one picture (ValueError).
    """
    if not images or len(images) != len(captions) or columns < 1:
        raise ValueError("a contact sheet needs at least one column, one picture and a caption for each picture")
    factor = max(1, round(CELL / max(max(image.size) for image in images)))
    pictures = [image.convert("RGB").resize(_times(image.size, factor), Image.Resampling.NEAREST) for image in images]
    cell_width = max(picture.width for picture in pictures)
    font = ImageFont.load_default(FONT_SIZE)
    texts = [_wrap(caption, font, cell_width) for caption in captions]

    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    picture_heights = [max(pictures[i].height for i in row) for row in rows]
    caption_heights = [_caption_height(max(len(texts[i]) for i in row)) for row in rows]
    columns = min(columns, len(pictures))
    width = 2 * MARGIN + columns * cell_width + (columns - 1) * GAP
    height = 2 * MARGIN + sum(picture_heights) + sum(caption_heights) + (len(rows) - 1) * GAP

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, picture_height, caption_height in zip(rows, picture_heights, caption_heights, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (cell_width + GAP)
            corner = (left + (cell_width - pictures[i].width) // 2, top + (picture_height - pictures[i].height) // 2)
            sheet.paste(pictures[i], corner)
            _frame(draw, corner, pictures[i].size)
            for number, line in enumerate(texts[i]):
                place = (left + cell_width / 2, top + picture_height + CAPTION_GAP + number * LINE_HEIGHT)
                draw.text(place, line, fill=INK, font=font, anchor="ma")
        top += picture_height + caption_height + GAP
    return sheet


def _times(size: tuple[int, int], factor: int) -> tuple[int, int]:
    return size[0] * factor, size[1] * factor


def _caption_height(lines: int) -> int:
    return CAPTION_GAP + lines * LINE_HEIGHT if lines else 0


def _frame(draw: ImageDraw.ImageDraw, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """A hairline around a picture, so that one with a white background still shows its edges."""
    left, top = corner
    draw.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=FRAME)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines no wider than `width` pixels, at spaces where possible, inside words where not."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
