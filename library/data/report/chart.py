"""A picture of how many images are in which bucket."""

from PIL import Image, ImageDraw, ImageFont

from library.data.report.summary import BucketRow, Summary
from library.data.scanning.wording import counted

WIDTH = 720  # pixels
ROW = 26
BAR = 16
MARGIN = 20
LABELS = 150  # pixels for the names at the left
COUNTS = 80  # and for the numbers at the right
BARS = 40  # more are not drawn
PAPER, INK, FAINT = (255, 255, 255), (40, 40, 46), (120, 120, 130)
COLOURS = ((66, 110, 180), (222, 128, 54), (70, 150, 110), (150, 92, 160))  # by dataset


def chart(summary: Summary) -> Image.Image:
    """A bar for each bucket, as long as it has images: those with the most of them, in the order of their shapes."""
    order = sorted(range(len(summary.buckets)), key=lambda i: -summary.buckets[i].images)
    rows = [summary.buckets[i] for i in sorted(order[:BARS])]
    left_out = len(summary.buckets) - len(rows)
    lines = len(rows) + 1 + bool(left_out)
    picture = Image.new("RGB", (WIDTH, 2 * MARGIN + lines * ROW), PAPER)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    draw.text((MARGIN, MARGIN), "images per bucket", fill=INK, font=font)
    most = max(row.images for row in rows)
    several = len({row.dataset for row in rows}) > 1
    for number, row in enumerate(rows, start=1):
        _bar(draw, font, MARGIN + number * ROW, row, most, several)
    if left_out:
        place = (MARGIN, MARGIN + (len(rows) + 1) * ROW)
        draw.text(place, f"and {counted(left_out, 'bucket', 'buckets')} with fewer images", fill=FAINT, font=font)
    return picture


def _bar(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, top: int, row: BucketRow, most: int, several: bool
) -> None:
    middle = top + ROW // 2
    label = f"{row.dataset}: {row.bucket}" if several else row.bucket
    draw.text((LABELS - 12, middle), label, fill=INK, font=font, anchor="rm")
    length = round((WIDTH - LABELS - COUNTS) * row.images / most)
    colour = COLOURS[row.dataset % len(COLOURS)]
    draw.rectangle((LABELS, middle - BAR // 2, LABELS + max(length, 1), middle + BAR // 2), fill=colour)
    draw.text((LABELS + length + 8, middle), str(row.images), fill=FAINT, font=font, anchor="lm")
