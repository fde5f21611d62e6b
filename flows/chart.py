"""The bubble chart of a study: a metric over the networks' Gflops, as DiT's paper shows it (arXiv 2212.09748, figures 2
and 8). A bubble's area is proportional to its network's Gflops; networks of one family share a colour and a line.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

LARGEST_AREA, LEAST_AREA = 1500.0, 6.0  # points^2; the least is still seen, though it is then too large
LOG_FROM_RATIO = 3.0  # values that lie further apart than this are shown by their ratios
RING = 14.0  # points between a name and the place for it that is next further out
CLOSE = 8  # places right at a bubble; a name further out gets a line to it
LINE_FROM = 4  # networks, for a correlation to tell anything
COLOURS = ("#7b3294", "#2b6cb0", "#1a9179", "#e08214", "#c2334d", "#5d5d5d")
INK, FAINT = "#22272e", "#6b7280"


@dataclass(frozen=True)
class Point:
    """One network: its name, the Gflops of a forward pass, its figure, and the family that it belongs to."""

    name: str
    gflops: float
    value: float
    family: str = ""


def bubbles(
    points: Sequence[Point], file: Path, *, title: str, metric: str, lower_is_better: bool, note: str = ""
) -> None:
    """Write the chart of at least one point as a PNG; Gflops are above 0, values finite."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.4), dpi=160, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    _frame(axes, points, metric, lower_is_better)
    if len({point.family for point in points}) == len(points):  # then a colour would tell nothing
        points = [replace(point, family="") for point in points]
    families = list(dict.fromkeys(point.family for point in sorted(points, key=lambda point: point.gflops)))
    colours = {family: COLOURS[number % len(COLOURS)] for number, family in enumerate(families)}
    largest = max(point.gflops for point in points)
    areas = {point: max(LARGEST_AREA * point.gflops / largest, LEAST_AREA) for point in points}
    for family in families:
        own = sorted((point for point in points if point.family == family), key=lambda point: point.gflops)
        x, y = [point.gflops for point in own], [point.value for point in own]
        if family and len(own) > 1:
            axes.plot(x, y, color=colours[family], linewidth=1.1, alpha=0.45, zorder=2)
        sizes = [areas[point] for point in own]
        style = {"color": colours[family], "edgecolors": "white", "linewidths": 0.9, "alpha": 0.92, "zorder": 3}
        axes.scatter(x, y, s=sizes, label=family, **style)
    if len(families) > 1:
        _legend(axes)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=26)
    below = "  ·  ".join(filter(None, ["bubble area: Gflops", _correlation(points), note]))
    axes.text(0, 1.025, below, transform=axes.transAxes, fontsize=9, color=FAINT, va="bottom")
    canvas.draw()
    _name(axes, points, areas)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def correlation(points: Sequence[Point]) -> float | None:
    """Pearson's coefficient of log Gflops and the value; None where it means nothing."""
    xs, ys = [math.log(point.gflops) for point in points], [point.value for point in points]
    if len(points) < LINE_FROM or len(set(xs)) == 1 or len(set(ys)) == 1:
        return None
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    together = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return together / math.sqrt(sum((a - x) ** 2 for a in xs) * sum((b - y) ** 2 for b in ys))


def _correlation(points: Sequence[Point]) -> str:
    value = correlation(points)
    return "" if value is None else f"correlation with log Gflops {value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _frame(axes: "Axes", points: Sequence[Point], metric: str, lower_is_better: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    for name, values in (("x", [point.gflops for point in points]), ("y", [point.value for point in points])):
        axis, low, high = getattr(axes, f"{name}axis"), min(values), max(values)
        if low > 0 and high / low >= LOG_FROM_RATIO:
            getattr(axes, f"set_{name}scale")("log")
            marks = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
            axis.set_major_locator(LogLocator(subs=marks))
            axis.set_minor_locator(NullLocator())
            axis.set_minor_formatter(NullFormatter())
            room = (high / low) ** 0.1
            getattr(axes, f"set_{name}lim")(low / room, high * room)
        else:
            room = 0.14 * (high - low) or 0.2 * abs(high) or 1.0
            getattr(axes, f"set_{name}lim")(low - room, high + room)
        axis.set_major_formatter(plain)
    better = "lower" if lower_is_better else "higher"
    axes.set_xlabel("Gflops of one forward pass", fontsize=10.5, color=INK)
    axes.set_ylabel(f"{metric}  ({better} is better)", fontsize=10.5, color=INK)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c4c9d1")


def _legend(axes: "Axes") -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", linestyle="none", markersize=7, color=colour, label=label)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        for colour in [handle.get_facecolor()[0]]
        if label
    ]
    axes.legend(handles=handles, frameon=False, fontsize=9, labelcolor=INK, loc="best")


def _name(axes: "Axes", points: Sequence[Point], areas: dict[Point, float]) -> None:
    """Write each name beside its bubble, where it covers no other name and as little as possible of other bubbles."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    pixels = axes.figure.dpi / 72
    centres = {point: axes.transData.transform((point.gflops, point.value)) for point in points}
    radii = {point: math.sqrt(areas[point] / math.pi) * pixels for point in points}
    circles = [Bbox.from_bounds(*(centres[p] - radii[p]), 2 * radii[p], 2 * radii[p]) for p in points]
    names: list[Bbox] = []
    for point in sorted(points, key=lambda point: -point.gflops):
        tries = []
        near = radii[point] / pixels + 3
        for x, y, across, along in _places(near):
            text = axes.annotate(
                point.name, (point.gflops, point.value), (x, y), textcoords="offset points", ha=across, va=along,
                fontsize=8.5, color=INK, zorder=4, path_effects=[withStroke(linewidth=2.2, foreground="white")],
            )  # fmt: skip
            box = text.get_window_extent()
            outside = box.width * box.height - _shared(box, axes.bbox)
            crossed = sum(_shared(box, name) for name in names) * 4 + sum(_shared(box, circle) for circle in circles)
            tries.append((crossed + 4 * outside, len(tries), text, box))
        best = min(tries)
        for other in tries:
            if other is not best:
                other[2].remove()
        names.append(best[3])
        if best[1] >= CLOSE:
            line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
            place = {"xytext": best[2].xyann, "textcoords": "offset points"}
            axes.annotate("", (point.gflops, point.value), **place, arrowprops=line)


def _places(away: float) -> Iterator[tuple[float, float, str, str]]:
    """Offsets from a bubble's centre, in points, and how a text is aligned there: the nicest first, then further out."""
    for out in (away, away + RING, away + 2 * RING):
        slant = out * 0.75
        yield from ((out, 0, "left", "center"), (-out, 0, "right", "center"))
        yield from ((0, out, "center", "bottom"), (0, -out, "center", "top"))
        yield from ((slant, slant, "left", "bottom"), (-slant, -slant, "right", "top"))
        yield from ((-slant, slant, "right", "bottom"), (slant, -slant, "left", "top"))


def _shared(one: "Bbox", other: "Bbox") -> float:
    """Pixels that two boxes have in common."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)
