"""What the papers report on ImageNet, and why a figure of one's own may not stand beside theirs.

Their figures come from ADM's evaluator (arXiv 2105.05233) and 50,000 samples: Inception's features from the weights of
2015-12-05, distances to statistics of the whole training set, precision and recall against 10,000 real images, at 512
pixels against 1,000. A figure that was come by in another way differs for that reason alone, so it is not shown in
their table but under it, with the reasons.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
HEADINGS = ("FID", "sFID", "IS", "Prec.", "Rec.")
IMAGES = 50_000
REAL_IMAGES = {256: 10_000, 512: 1_000}  # that precision and recall are measured against
SPLITS = 10  # of the Inception Score
ORDER_MATTERS = 0.05  # beyond that share the order of the file, and not chance, decides the Inception Score


@dataclass(frozen=True)
class Published:
    """One row of a paper's table: a model's figures on ImageNet at `image_size` pixels, None where there is none."""

    model: str
    image_size: int
    fid: float
    sfid: float | None
    inception_score: float
    precision: float | None
    recall: float | None
    arxiv: str
    unsure: str = ""  # what is not certain about the figures


def _rows(image_size: int, table: str) -> tuple[Published, ...]:
    rows = []
    for line in table.strip().splitlines():
        model, figures, arxiv, *unsure = (cell.strip() for cell in line.split("|"))
        values = (None if figure == "-" else float(figure) for figure in figures.split())
        rows.append(Published(model, image_size, *values, arxiv, *unsure))
    return tuple(rows)


# FID, sFID, Inception Score, precision, recall as tables 2 and 3 of arXiv 2212.09748 print them; SiT's from its own.
PUBLISHED = _rows(
    256,
    """
    BigGAN-deep              |  6.95 7.36 171.40 .87 .28 | 1809.11096
    StyleGAN-XL              |  2.30 4.02 265.12 .78 .53 | 2202.00273
    ADM                      | 10.94 6.02 100.98 .69 .63 | 2105.05233
    ADM-U                    |  7.49 5.13 127.49 .72 .63 | 2105.05233
    ADM-G                    |  4.59 5.25 186.70 .82 .52 | 2105.05233
    ADM-G, ADM-U             |  3.94 6.14 215.84 .83 .53 | 2105.05233
    CDM                      |  4.88 -    158.71 -   -   | 2106.15282
    LDM-8                    | 15.51 -     79.03 .65 .63 | 2112.10752
    LDM-8-G                  |  7.76 -    209.52 .84 .35 | 2112.10752
    LDM-4                    | 10.56 -    103.49 .71 .62 | 2112.10752
    LDM-4-G (cfg 1.25)       |  3.95 -    178.22 .81 .55 | 2112.10752
    LDM-4-G (cfg 1.50)       |  3.60 -    247.67 .87 .48 | 2112.10752
    DiT-XL/2                 |  9.62 6.85 121.50 .67 .67 | 2212.09748
    DiT-XL/2 (cfg 1.25)      |  3.22 5.28 201.77 .76 .62 | 2212.09748
    DiT-XL/2 (cfg 1.50)      |  2.27 4.60 278.24 .83 .57 | 2212.09748
    SiT-XL/2 (cfg 1.50, SDE) |  2.06 4.50 270.27 .82 .59 | 2401.08740 | precision is quoted as 0.82 and as 0.83
    """,
) + _rows(
    512,
    """
    BigGAN-deep              |  8.43  8.13 177.90 .88 .29 | 1809.11096
    StyleGAN-XL              |  2.41  4.06 267.75 .77 .52 | 2202.00273
    ADM                      | 23.24 10.19  58.06 .73 .60 | 2105.05233
    ADM-U                    |  9.96  5.62 121.78 .75 .64 | 2105.05233
    ADM-G                    |  7.72  6.57 172.71 .87 .42 | 2105.05233
    ADM-G, ADM-U             |  3.85  5.86 221.72 .84 .53 | 2105.05233
    DiT-XL/2                 | 12.03  7.12 105.25 .75 .64 | 2212.09748
    DiT-XL/2 (cfg 1.25)      |  4.64  5.77 174.77 .81 .57 | 2212.09748
    DiT-XL/2 (cfg 1.50)      |  3.04  5.02 240.82 .84 .54 | 2212.09748
    SiT-XL/2 (cfg 1.50, SDE) |  2.62  -    252.21 -   -   | 2401.08740
    """,
)


def obstacles(metric: str, record: Mapping[str, Any]) -> list[str]:
    """Why this figure is not comparable with the papers' of the same name (one of METRICS); empty where it is.

    `record` tells how it was made: count, extractor, image_size, and except for the Inception Score reference_form,
    reference_image_size, and for precision and recall reference_count. What it does not tell counts against it.
    """
    told = record.get
    reasons = []
    if told("image_size") not in REAL_IMAGES:
        reasons.append(f"the images have {told('image_size')} pixels, the papers' 256 or 512")
    if told("count") != IMAGES:
        effect = " (fewer raise it)" if metric in ("fid", "sfid") and (told("count") or 0) < IMAGES else ""
        reasons.append(f"{_number(told('count'))} images, not {IMAGES:,}{effect}")
    if told("extractor") != "inception":
        reasons.append(f"the features are of {told('extractor')}, not of Inception with its published weights")
    if metric == "inception_score":
        if told("splits", SPLITS) != SPLITS:
            reasons.append(f"{told('splits')} splits, not {SPLITS}")
        return reasons
    if told("reference_form") != "adm":
        reasons.append("the reference is not ADM's batch, whose statistics are of the whole training set")
    elif told("reference_image_size") != told("image_size"):
        reasons.append(f"the reference's images have {told('reference_image_size')} pixels")
    real = REAL_IMAGES.get(told("image_size"))
    if metric in ("precision", "recall") and real and told("reference_count") != real:
        reasons.append(f"against {_number(told('reference_count'))} real images, the papers' against {real:,}")
    return reasons


def column_of(record: Mapping[str, Any]) -> str | None:
    """Which of METRICS a record's figure is: `fid` for fid_inception_50k; None for fid_inception_pooled_50k, kid_...

    ADM's Inception Score is taken in file order, so that is the one that stands beside the papers'.
    """
    kind, found, rest = record["metric"].partition(f"_{record['extractor']}_")
    if not found or not rest[:1].isdigit() or kind == "inception_score":
        return None
    kind = kind.removesuffix("_file_order")
    return kind if kind in METRICS else None


def compared(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each of METRICS that the records have: its `value` and the `obstacles` to comparing it."""
    records = list(records)
    by_column = {column_of(record): record for record in records}
    shuffled = [record["value"] for record in records if record["metric"].startswith("inception_score_inception_")]
    found = {}
    for metric in METRICS:
        if metric in by_column:
            value, reasons = by_column[metric]["value"], obstacles(metric, by_column[metric])
            if metric == "inception_score" and shuffled and abs(shuffled[0] - value) > ORDER_MATTERS * shuffled[0]:
                reasons.append(f"the file is sorted, by class it seems: shuffled, the score is {shuffled[0]:.2f}")
            found[metric] = {"value": value, "obstacles": reasons}
    return found


def table(figures: Mapping[str, Mapping[str, Any]], image_size: int, name: str = "this model") -> str:
    """The papers' rows at this size, and below them the figures of `compared`: what is comparable as a row of its own,
    the rest as `n/c` with a line that says why."""
    rows = [row for row in PUBLISHED if row.image_size == image_size]
    if not rows:
        sizes = " and ".join(str(size) for size in REAL_IMAGES)
        return (
            f"The papers' figures are of ImageNet at {sizes} pixels; images of {image_size} have none to stand beside."
        )
    lines = [[f"ImageNet {image_size}", *HEADINGS, "arXiv"]]
    lines += [[row.model, *(_figure(metric, getattr(row, metric)) for metric in METRICS), row.arxiv] for row in rows]
    mine = [
        "n/c" if figures.get(metric, {}).get("obstacles") else _figure(metric, figures.get(metric, {}).get("value"))
        for metric in METRICS
    ]
    lines.append([name, *mine, ""])
    width = max(len(line[0]) for line in lines)
    text = [f"{head:<{width}}" + "".join(f"{cell:>9}" for cell in cells) + f"  {end}" for head, *cells, end in lines]
    text += [f"{row.model}: {row.unsure}." for row in rows if row.unsure]
    for metric, heading in zip(METRICS, HEADINGS, strict=True):
        if figures.get(metric, {}).get("obstacles"):
            value, reasons = figures[metric]["value"], "; ".join(figures[metric]["obstacles"])
            text.append(f"{heading} {_figure(metric, value)} is not comparable: {reasons}.")
    return "\n".join(line.rstrip() for line in text)


def _figure(metric: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _number(count: int | None) -> str:
    return "an unknown number of" if count is None else f"{count:,}"
