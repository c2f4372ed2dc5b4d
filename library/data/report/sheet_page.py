"""The facts of a dataset sheet -> its page: HTML without scripts, that needs nothing but its pictures."""

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

_STYLE = Path(__file__).with_name("sheet.css")
_PIECES = re.compile(r"[^,]+,?\s*|,\s*")  # tags with what separates them
_WORDS = re.compile(r"\S+\s*|\s+")
_SMALL = 256  # pixels: smaller pictures are enlarged without smoothing

Facts = Mapping[str, Any]


def page(facts: Facts) -> str:
    """The whole page. `facts` are those that `write_sheet` keeps as JSON."""
    shown = f"all {facts['images']}" if facts["shown"] == facts["images"] else f"{facts['shown']} of {facts['images']}"
    chosen = "" if facts["shown"] == facts["images"] else ", an even choice from each bucket of each folder"
    several = len({subset["dataset"] for subset in facts["subsets"]}) > 1
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"><title>Dataset sheet</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style></head><body>",
            "<header><h1>Dataset sheet</h1>",
            f'<p class="faint">Shows {shown} images in use{chosen}, as training sees them in '
            f"{_epochs(range(1, facts['epochs'] + 1))} with seed {facts['seed']}.</p></header>",
            _problems(facts["problems"]),
            _tables(facts),
            *(_subset(subset, several) for subset in facts["subsets"]),
            "</body></html>\n",
        ]
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _epochs(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"epoch {numbers[0]}"
    if len(numbers) == numbers[-1] - numbers[0] + 1:
        return f"epochs {numbers[0]}–{numbers[-1]}"
    return f"epochs {', '.join(map(str, numbers))}"


def _sides(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"


def _problems(problems: Sequence[Facts]) -> str:
    if not problems:
        return '<p class="panel">No problems found.</p>'
    items = []
    for problem in problems:
        files = ", ".join(f"<code>{_text(name)}</code>" for name in problem["files"])
        items.append(f"<li><b>{_text(problem['where'])}</b>: {_text(problem['what'])}{': ' * bool(files)}{files}</li>")
    heading = f"{len(problems)} thing{'s' * (len(problems) > 1)} to look at"
    return f'<details class="panel problems" open><summary>{heading}</summary><ul>{"".join(items)}</ul></details>'


def _tables(facts: Facts) -> str:
    parts = ['<details class="panel" open><summary>In numbers</summary><div class="tables">']
    for table in facts["tables"]:
        head = _row("th", table["headings"], table["left"])
        rows = "".join(_row("td", row, table["left"]) for row in table["rows"])
        parts.append(f"<div><table><caption>{_text(table['title'])}</caption>{head}{rows}</table></div>")
    totals = "".join(f'<p class="small">{_text(line)}</p>' for line in facts["totals"])
    return "".join([*parts, f"</div>{totals}</details>"])


def _row(tag: str, cells: Sequence[str], left: Sequence[bool]) -> str:
    classes = [' class="left"' if is_left else "" for is_left in left]
    return f"<tr>{''.join(f'<{tag}{c}>{_text(cell)}</{tag}>' for cell, c in zip(cells, classes, strict=True))}</tr>"


def _subset(subset: Facts, several: bool) -> str:
    """One folder: its facts and options, and a grid of cards for each bucket."""
    owner = f'<span class="faint">dataset {subset["dataset"]} · </span>' if several else ""
    chips = [_chip(f"{name} {value}" if value is not True else name) for name, value in subset["options"].items()]
    if subset["regularisation"]:
        chips.insert(0, _chip("regularisation", "reg"))
    line = f"{subset['images']} images × {subset['repeats']} repeats, {subset['per_epoch']} uses per epoch"
    line += f", {subset['held_out']} held out for validation" if subset["held_out"] else ""
    line += f", {subset['unused']} unused" if subset["unused"] else ""
    if subset["class_tokens"]:
        line += f", class tokens “{subset['class_tokens']}”"
    return "\n".join(
        [
            f'<section><h2>{owner}{_text(subset["name"])}</h2><p class="faint small">{_text(subset["path"])}</p>',
            f'<p class="small">{_text(line)}</p><p class="chips">{"".join(chips)}</p>',
            f'<div class="buckets">{"".join(map(_bucket, subset["buckets"]))}</div></section>',
        ]
    )


def _bucket(bucket: Facts) -> str:
    count, shown = bucket["images"], len(bucket["cards"])
    facts = f"{count} image{'s' * (count > 1)}" + ("" if shown == count else f", {shown} shown")
    heading = f"<h3>{_sides(bucket['bucket'])} <small>{facts}</small></h3>"
    cards = "".join(map(_card, bucket["cards"]))
    return f'<div class="bucket" style="--cards: {shown}">{heading}<div class="grid">{cards}</div></div>'


def _chip(text: str, kind: str = "") -> str:
    return f'<span class="chip {kind}">{_text(text)}</span>'


def _card(card: Facts) -> str:
    size = f"{_sides(card['size'])} → {_sides(card['resized'])} → {_sides(card['bucket'])}"
    facts = [size, f"aspect error {card['aspect_error']:.3f}", f"{card['repeats']:g}× per epoch"]
    facts += ["enlarged"] * card["upscaled"]
    problem = f'<p class="bad small">{_text(card["problem"])}</p>' if card["problem"] else ""
    return "\n".join(
        [
            f'<article><div class="figures">{"".join(_figures(card))}</div>',
            f'<div class="facts"><span class="file">{_text(card["file"])}</span>{problem}',
            f'<p class="small faint">{" · ".join(facts)}</p></div>',
            _source(card),
            f'<ul class="drawings">{"".join(_drawings(card["drawings"]))}</ul></article>',
        ]
    )


def _figures(card: Facts) -> Iterator[str]:
    """The pictures that differ, each with the one that shows its mask."""
    width, height = card["bucket"]
    kind = ' class="small-image"' if max(width, height) <= _SMALL else ""
    sizes = f'{kind} width="{width}" height="{height}" loading="lazy"'
    name = html.escape(card["file"])
    for picture in card["pictures"]:
        words = [_epochs(picture["epochs"])] if picture["epochs"] else []
        words += ["mirrored"] if picture["flipped"] else []
        words += [] if card["drawings"] else ["not used in these epochs"]
        figures = _figure(f'<img src="{picture["image"]}" alt="{name}"{sizes}>', " · ".join(words))
        if "mask" in picture:
            legend = f'<span class="swatch"></span> masked out, {picture["mask_area"]:.0%} left'
            figures += _figure(f'<img src="{picture["mask"]}" alt="mask of {name}"{sizes}>', legend)
        yield f'<div class="pair">{figures}</div>'


def _figure(image: str, caption: str) -> str:
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _source(card: Facts) -> str:
    """What is on disk, where it is not what is drawn."""
    if all(drawing["caption"] == card["caption"] for drawing in card["drawings"]):
        return ""
    caption = f'<bdi class="text">{_text(card["caption"])}</bdi>'
    return f'<details class="source"><summary>caption on disk</summary>{caption}</details>'


def _drawings(drawings: Sequence[Facts]) -> Iterator[str]:
    """The captions, successive ones that are the same as one; marked is what differs from the first not empty one."""
    first = next((drawing["caption"] for drawing in drawings if drawing["caption"]), "")
    for caption, group in groupby(drawings, key=lambda drawing: drawing["caption"]):
        same = list(group)
        tokens = " ".join(_tokens(name, facts) for name, facts in same[0]["tokens"].items())
        label = _epochs([drawing["epoch"] for drawing in same]) + (f" · tokens: {tokens}" if tokens else "")
        cut = [facts["cut"] for facts in same[0]["tokens"].values()]
        text = _caption(caption, _changes(first, caption), max(cut, key=len, default=""))
        yield f'<li><span class="label">{label}</span>{text}</li>'


def _tokens(name: str, facts: Facts) -> str:
    words = f"{name} {facts['count']}"
    return _chip(f"{words}, cut off", "bad") if facts["cut"] else _chip(words)


def _changes(first: str, caption: str) -> list[tuple[int, int]]:
    """The parts of a caption, as (start, end), that are not in the first one, or elsewhere there."""
    pattern = _PIECES if "," in first or "," in caption else _WORDS
    old, new = pattern.findall(first), pattern.findall(caption)
    bare = [[piece.strip(" ,\n") for piece in pieces] for pieces in (old, new)]
    starts = [0, *accumulate(map(len, new))]
    ends = [start + len(piece.rstrip(" ,")) for start, piece in zip(starts, new, strict=False)]
    matcher = SequenceMatcher(None, *bare, autojunk=False)
    return [(starts[a], ends[b - 1]) for kind, _, _, a, b in matcher.get_opcodes() if kind != "equal" and a < b]


def _caption(caption: str, changes: Iterable[tuple[int, int]], cut: str) -> str:
    """A caption with its changed parts marked and its end that is cut off struck through."""
    if not caption:
        return '<span class="text empty">empty caption</span>'
    kept = len(caption) - len(cut) if caption.endswith(cut) else len(caption)
    changes = list(changes)
    edges = sorted({0, kept, len(caption), *(edge for change in changes for edge in change)})
    parts = []
    for start, end in pairwise(edges):
        part = _text(caption[start:end])
        if any(a <= start < b for a, b in changes):
            part = f"<mark>{part}</mark>"
        parts.append(f"<s>{part}</s>" if start >= kept else part)
    elsewhere = f"<br><s>{_text(cut)}</s>" if cut and kept == len(caption) else ""
    return f'<bdi class="text">{"".join(parts)}{elsewhere}</bdi>'
