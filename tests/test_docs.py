"""What the docs promise to tell is there."""

import re
from pathlib import Path

import pytest

from library import options
from library.options import Option, options_of

ROOT = Path(__file__).resolve().parent.parent
SHAPING = (
    options.ObjectiveOptions,
    options.OptimizerOptions,
    options.SchedulerOptions,
    options.EmaOptions,
    options.PrecisionOptions,
    options.MemoryOptions,
    options.AttentionOptions,
)
TEXT = (ROOT / "docs" / "training_options.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| `--") and line.count("|") in (4, 5)]
NUMBERS = re.compile(r"\d[\d.]*(?:e-?\d+)?")


@pytest.mark.parametrize(
    "option", [option for group in SHAPING for option in options_of(group)], ids=lambda one: one.name
)
def test_every_option_that_shapes_a_step_is_explained_with_its_default(option: Option) -> None:
    rows = [row for row in ROWS if re.search(rf"`--{option.name}[ `]", row.split("|")[1])]
    (row,) = rows
    default = row.rstrip("| ").rpartition("|")[2]
    if type(option.default) in (int, float) and option.default:
        assert option.default in [float(number) for number in NUMBERS.findall(default)]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor
