"""A picture of the learning rates that a run is going to have."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from library.data.report.chart import COLOURS, FAINT, INK, MARGIN, PAPER, ROW, WIDTH
from library.options.scheduler import SchedulerOptions
from library.training.logs import Log
from library.training.optimization.courses import put_at, sample
from library.training.optimization.optimizers import finds_steps
from library.training.optimization.schedulers import planned
from library.training.resuming.state import Progress

if TYPE_CHECKING:
    from library.training.motion import Motion

HEIGHT = 240  # pixels of the curves
LEFT = 90  # pixels for the numbers beside them
POINTS = WIDTH - LEFT - MARGIN  # more cannot be seen


def show_planned_rates(options: SchedulerOptions, motion: "Motion", progress: Progress, log: Log) -> None:
    """Log the picture of the steps that are left. There is none where the optimizer finds its steps itself.

    It is a picture, not numbers: those of steps to come would keep Weights & Biases from taking the real ones.
    """
    left = progress.total_steps - progress.step
    if not log.trackers or left < 1 or finds_steps(motion.optimizer):
        return
    groups = motion.optimizer.param_groups
    ahead = planned(options, motion.optimizer, [group["asked_rate"] for group in groups], progress.total_steps)
    put_at(ahead, motion.scheduler.last_epoch)
    rates = {
        progress.step + 1 + number: [
            rate if group.trained_in(progress.step + number) else 0.0
            for group, rate in zip(motion.groups, values, strict=True)
        ]
        for number, values in sample(ahead, left, POINTS).items()
    }
    finds = any("d" in group for group in groups)
    title = f"planned factors of the rate that {type(motion.optimizer).__name__} finds" if finds else "planned rates"
    names = [group.name for group in motion.groups]
    log.pictures({"learning_rate": rate_chart(names, rates, title)}, progress.step)


def rate_chart(names: list[str], rates: Mapping[int, list[float]], title: str) -> Image.Image:
    """A line for each group of parameters, over steps counted from 1; groups with the same rates share one."""
    curves: dict[tuple[float, ...], str] = {}
    for name, curve in zip(names, zip(*rates.values(), strict=True), strict=True):
        curves[curve] = f"{curves[curve]}, {name}" if curve in curves else name
    picture = Image.new("RGB", (WIDTH, 2 * MARGIN + HEIGHT + (3 + len(curves)) * ROW), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=font)
    bottom, right = MARGIN + 2 * ROW + HEIGHT, WIDTH - MARGIN
    most, first, last = max(map(max, curves)) or 1.0, min(rates), max(rates)
    for part in (0.0, 0.5, 1.0):
        height = bottom - part * HEIGHT
        draw.line((LEFT, height, right, height), fill=(225, 225, 230))
        draw.text((LEFT - 8, height), f"{part * most:.3g}", fill=FAINT, font=font, anchor="rm")
    for step, anchor in ((first, "la"), (last, "ra")):
        draw.text((LEFT if step == first else right, bottom + 6), f"step {step}", fill=FAINT, font=font, anchor=anchor)
    across = (right - LEFT) / max(last - first, 1)
    for number, (curve, name) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [
            (LEFT + (step - first) * across, bottom - rate / most * HEIGHT)
            for step, rate in zip(rates, curve, strict=True)
        ]
        draw.line(points if len(points) > 1 else points * 2, fill=colour, width=2)
        line = bottom + (number + 1.5) * ROW
        draw.rectangle((LEFT, line - 2, LEFT + 24, line + 2), fill=colour)
        label = f"{name}: {max(curve):.3g} at most, {curve[-1]:.3g} in step {last}"
        draw.text((LEFT + 32, line), label, fill=INK, font=font, anchor="lm")
    return picture
