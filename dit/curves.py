"""loss.csv of a training: reading it, and drawing it as an SVG that stands by itself.

`python -m dit.curves artifacts/train/loss.csv curve.svg "a title"` draws one for a document.
"""

import csv
import io
import re
import sys
from pathlib import Path

from dit.paths import write_atomic

INK = "#3355aa"
SHADES = ("#c2334d", "#e08214", "#1a9179", "#7b3294")  # of quarters of time, from noise to data


def read_losses(file: Path) -> list[dict[str, float]]:
    """Its rows: step, loss, lr and, of later versions, grad_norm, skipped and loss_t1 (the noisiest quarter of times) to
    loss_t4. A cell that is empty, since there was nothing to average, is missing from its row."""
    with open(file, newline="") as stream:
        return [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(stream)]


def loss_svg(file: Path, title: str = "") -> str:
    """The loss over steps, of all images and of each quarter of times where the file tells them."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = read_losses(file)
    figure = Figure(figsize=(8, 3))
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    levels = sorted({name for row in rows for name in row if re.fullmatch(r"loss_t\d", name)})
    for name, colour in zip(levels, SHADES, strict=False):
        number = int(name.removeprefix("loss_t"))
        place = {1: " (noise)", len(levels): " (data)"}.get(number, "")
        label = f"times {(number - 1) / len(levels):.2g} to {number / len(levels):.2g}{place}"
        axes.plot(*_line(rows, name), color=colour, linewidth=0.8, alpha=0.7, label=label)
    axes.plot(*_line(rows, "loss"), color=INK, linewidth=1.8, label="all")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    if levels:
        axes.legend(frameon=False, fontsize="small", ncols=2)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "dit"}):  # the same curve gives the same bytes
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def _line(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    told = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in told], [value for _, value in told]


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit("python -m dit.curves LOSS.CSV CURVE.SVG [TITLE]")
    write_atomic(Path(sys.argv[2]), loss_svg(Path(sys.argv[1]), *sys.argv[3:4]).encode())
