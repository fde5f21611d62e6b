"""A scorecard as people read it: the figures with their intervals, then what has to be known about them."""

from collections.abc import Mapping, Sequence
from typing import Any

from dit import papers
from dit.perclass import worst

WORST_CLASSES = 5


def text(card: Mapping[str, Any]) -> str:
    """The whole card (see `scorecard.record`) in lines of text."""
    parts = ["\n".join(heading(card)), table(card["records"]), "\n".join(notes(card))]
    if "papers" in card:
        size = card["samples"]["size"]
        parts.append(papers.table(card["papers"], size[0] if size[0] == size[1] else 0, "these images"))
    return "\n\n".join(part for part in parts if part)


def heading(card: Mapping[str, Any]) -> list[str]:
    """Whose images, against what, seen by whom."""
    samples, reference, extractor = card["samples"], card["reference"], card["extractor"]
    of = "images that the file does not count" if reference["count"] is None else f"{reference['count']:,} images"
    form = {
        "ours": "our own statistics",
        "adm": "ADM's batch",
        "statistics": "a statistics file",
        "images": "made of images",
    }[reference["form"]]
    weights = "published weights" if extractor["official"] else "weights"
    return [
        f"{samples['name']}: {samples['count']:,} images of {samples['size'][0]} x {samples['size'][1]}, {_short(samples)}",
        f"reference: {form}, {of}, {reference['one_by_one']:,} of them one by one, {_short(reference)}",
        f"features: {extractor['name']}, {weights} {_short(extractor)}, resize {extractor['resize'] or 'unknown'}",
    ]


def table(records: list[Mapping[str, Any]]) -> str:
    """A row for each figure; its interval is of 95%."""
    rows = [("metric", "value", "95% interval", "images", "real images")]
    for told in records:
        low, high = told.get("interval", (None, None))
        interval = "" if low is None else f"{number(low)} to {number(high)}"
        real = "" if told["metric"].startswith(("inception_score", "class_agreement")) else told["reference_count"]
        real = "unknown" if real is None else real if real == "" else f"{real:,}"
        rows.append((told["metric"], number(told["value"]), interval, f"{told['count']:,}", real))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    )


def notes(card: Mapping[str, Any]) -> list[str]:
    """What a figure alone does not tell: its bias, what is not comparable, which classes fail, what looks copied."""
    lines = []
    if infinity := card.get("infinity"):
        value = card["metrics"][infinity["metric"]]
        tends = f"{number(infinity['limit'])} (+- {number(infinity['standard_error'])} by the fit) of infinitely many"
        if infinity["limit"] < value:
            lines.append(
                f"{infinity['metric']} falls as images are added: towards {tends}, so about "
                f"{number(value - infinity['limit'])} of it is the sample's size. Compare figures of equal counts only."
            )
        else:
            lines.append(f"{infinity['metric']} does not fall as images are added: the fit tends to {tends}.")
    if (form := card["reference"]["form"]) in ("adm", "statistics"):
        images = "that it is ADM's own is told by its form alone" if form == "adm" else "pytorch-fid's is another"
        lines.append(
            f"The reference does not say whose features its statistics are of: {card['extractor']['name']}'s are assumed, "
            f"of images resized as here ({images})."
        )
    if card["extractor"]["name"] == "random":
        lines.append("Features of random weights compare how images look, not what they show: no paper's figures.")
    scores = {told["metric"]: told["value"] for told in card["records"] if told["metric"].startswith("inception_score")}
    in_order = next((value for name, value in scores.items() if "_file_order_" in name), None)
    shuffled = next((value for name, value in scores.items() if "_file_order_" not in name), None)
    if in_order and shuffled and abs(in_order - shuffled) > papers.ORDER_MATTERS * shuffled:
        lines.append(
            f"The file is sorted, by class it seems: in its order the score is {in_order:.2f}, shuffled {shuffled:.2f}."
        )
    if classes := {int(label): score for label, score in card["classes"].items()}:
        shown = "; ".join(_class(label, score) for label, score in worst(classes, WORST_CLASSES))
        few = sum(score["fid"] is None for score in classes.values())
        silent = f" ({few} of {len(classes)} classes have too few images for a distance)" if few else ""
        lines.append(f"Classes that fail most: {shown or 'none can be told'}{silent}.")
    if copies := card.get("copies"):
        warning = "WARNING: " if copies["warning"] else ""
        lines.append(f"{warning}{copies['verdict']}; the closest pairs are in {copies['picture']}.")
    return lines


def number(value: float) -> str:
    """Four significant digits, and no fewer than two decimals below 1,000."""
    if 0 < abs(value) < 0.1:
        return f"{value:#.4g}"
    if value != value or abs(value) >= 1_000:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 100 else f"{value:.3f}" if abs(value) >= 10 else f"{value:.4f}"


def _class(label: int, score: Mapping[str, Any]) -> str:
    told = [] if score["fid"] is None else [f"fid {number(score['fid'])}"]
    told += [] if score["agreement"] is None else [f"read as it {score['agreement']:.0%}"]
    return f"{label} ({', '.join(told)}, {score['num_images']} images)"


def _short(part: Mapping[str, Any]) -> str:
    return f"sha256 {part['digest'][:12]}"
