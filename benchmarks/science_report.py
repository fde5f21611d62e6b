"""docs/science.md: the tables and plots of the rows that benchmarks/science.py has made. Its text between the tables is
kept: what was seen is written by a person, the figures are not."""

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from science import read_rows

FOLDER = Path("docs/science")
PAGE = Path("docs/science.md")
METRICS = {
    "fid": "FID",
    "fid_pooled": "FID pooled",
    "class_agreement": "agreement",
    "precision": "precision",
    "recall": "recall",
}
Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """A Markdown table of one study: seeds of one trial and setting in one line, mean and range."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["trial"]["name"], row["setting"]["name"]].append(row)
    drawn = len({setting for _, setting in groups}) > 1
    trained = len({trial for trial, _ in groups}) > 1
    head = (
        ["training"] * trained
        + ["drawn with"] * drawn
        + ["evaluations", "parameters", "MMACs", "loss", *METRICS.values(), "seeds"]
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (trial, setting), group in groups.items():
        first = group[0]
        cells = [trial] * trained + [setting] * drawn
        cells += [
            f"{_mean([r['evaluations'] for r in group]):g}",
            f"{first['parameters']:,}",
            f"{1000 * first['gmacs']:.1f}",
        ]
        cells += [_spread([r["loss"] for r in group], 3)]
        cells += [_spread([r["metrics"][name] for r in group], 3 if "fid" in name else 2) for name in METRICS]
        lines.append("| " + " | ".join([*cells, str(len(group))]) + " |")
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{_mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def curve(rows: list[Row], x: Any, label: Any, xlabel: str, title: str, file: str) -> None:
    """FID over `x(row)`, a line per `label(row)`, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        lines[label(row)].append((x(row), row["metrics"]["fid"]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="FID, hidden layer, 1,000 images", title=title)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(FOLDER / file, dpi=110)
    plt.close(figure)


def bars(rows: list[Row], title: str, file: str) -> None:
    """FID of each trial, seeds as points."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[f"{row['trial']['name']}, {row['setting']['name']}"].append(row["metrics"]["fid"])
    figure, axes = plt.subplots(figsize=(6.4, 0.5 + 0.34 * len(groups)), layout="constrained")
    for place, values in enumerate(groups.values()):
        axes.barh(place, _mean(values), color="#9ab8d8")
        axes.plot(values, [place] * len(values), "k.", markersize=5)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set(xlabel="FID, hidden layer, 1,000 images (points: seeds)", title=title)
    figure.savefig(FOLDER / file, dpi=110)
    plt.close(figure)


def bubbles(rows: list[Row], file: str) -> None:
    """FID over the cost of one forward pass; the area of a bubble is the number of parameters."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for row in rows:
        size, patch = row["trial"]["size"], row["trial"]["patch_size"]
        color = {"S": "C0", "M": "C1", "L": "C2"}[size]
        at = (1000 * row["gmacs"], row["metrics"]["fid"])
        axes.scatter(*at, s=row["parameters"] / 4000, color=color, alpha=0.6)
        axes.annotate(f"{size}/{patch}", at, ha="center", va="center", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="MMACs of one forward pass", ylabel="FID, hidden layer, 1,000 images")
    axes.set_title("sizes and patches, equal steps (area: parameters)")
    axes.grid(True, which="both", alpha=0.2)
    figure.savefig(FOLDER / file, dpi=110)
    plt.close(figure)


def main() -> None:
    studies: dict[str, list[Row]] = defaultdict(list)
    for row in read_rows():
        studies[row["study"]].append(row)
    FOLDER.mkdir(parents=True, exist_ok=True)
    sampler = lambda row: row["setting"]["sampler"]  # noqa: E731
    calls = lambda row: row["evaluations"]  # noqa: E731
    for study, title in (
        ("designs", "block designs"),
        ("objectives", "objectives"),
        ("options", "options, patch 2"),
        ("guidance", "guidance"),
    ):
        if studies[study]:
            bars(studies[study], title, f"{study}.png")
    solvers = [
        r
        for r in studies["solvers"]
        if r["setting"]["diffusion_form"] == "sigma" and r["setting"]["sampler"] != "sde_heun"
    ]
    if solvers:
        curve(solvers, calls, sampler, "network evaluations", "solvers (one model per objective)", "solvers.png")
    if studies["compute"]:
        total = lambda row: 2 * row["evaluations"] * row["gmacs"]  # noqa: E731
        size = lambda row: row["trial"]["name"]  # noqa: E731
        curve(
            studies["compute"],
            total,
            size,
            "GMACs per image, guidance included",
            "sampling compute: 8 to 256 steps",
            "compute.png",
        )
    if studies["sizes"]:
        bubbles(studies["sizes"], "sizes.png")
    page = PAGE.read_text()
    for study, rows in studies.items():
        block = f"<!-- {study} -->\n{table(rows)}\n<!-- end -->"
        page, found = re.subn(rf"<!-- {study} -->.*?<!-- end -->", lambda _, block=block: block, page, flags=re.DOTALL)
        assert found == 1, f"{PAGE} has no place for the study {study}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
