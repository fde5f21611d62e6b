"""report: one self-contained page that a person opens: pictures, curves, metrics with their floors, settings, lineage."""

import base64
import html
import json
from pathlib import Path
from typing import Any

from dit import entry
from dit.curves import loss_svg, read_losses
from dit.paths import Paths, publish

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1f; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th, td { padding: .25rem .8rem; text-align: left; }
td.number { text-align: right; white-space: nowrap; } tr:nth-child(even) { background: #f6f6f8; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; }
figure img { image-rendering: pixelated; width: 26rem; max-width: 100%; } figcaption, .note { color: #666; font-size: .9rem; }
pre { background: #f6f6f8; padding: 1rem; overflow-x: auto; font-size: .85rem; }
"""


def report(*, paths: Paths) -> None:
    """Write artifacts/report/index.html. It reads files only, and needs neither network nor server to be looked at."""
    at = paths.artifacts
    told = {
        name: json.loads((at / file).read_text())
        for name, file in {
            "metrics": "evaluate/metrics.json",
            "details": "evaluate/details.json",
            "model": "register/model.json",
            "checkpoint": "ema/config.json",
            "run": "train/run.json",
            "reference": "reference/reference.json",
            "vae": "vae/fit.json",
        }.items()
    }
    checkpoint = told["checkpoint"]
    title = f"{checkpoint['data']['name']}: {told['model']['name']}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        summary(told),
        "<h2>Pictures</h2>",
        pictures(at),
        "<h2>Metrics</h2>",
        metrics_table(told["metrics"], told["details"]),
        "<h2>How far to trust them</h2>",
        *(
            trust(name, details, told["details"]["classes"], at)
            for name, details in told["details"]["settings"].items()
        ),
        "<h2>Loss</h2>",
        loss_curve(at / "train" / "loss.csv"),
        "<h2>Lineage</h2>",
        lineage(told),
        "<h2>Settings</h2>",
        settings(checkpoint),
    ]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    with publish(at / "report", paths.scratch) as folder:
        (folder / "index.html").write_text(page + "\n".join(body) + "</html>\n")
    print(f"open {at / 'report' / 'index.html'}")


def summary(told: dict[str, Any]) -> str:
    """What the page shows, and what became of the model."""
    model, checkpoint = told["model"], told["checkpoint"]
    network = checkpoint["model"]
    place = f"version {model['version']}, alias {model['alias']}" if model["registered"] else "not registered"
    sentences = [
        f"A diffusion transformer of width {network['hidden_size']}, depth {network['depth']}, patch {network['patch_size']}",
        f"({checkpoint['objective']['name']} objective, {checkpoint['step']} steps),",
        f"registered as {model['name']}: {place}." if model["registered"] else f"{model['name']} is not registered.",
    ]
    return f"<p>{html.escape(' '.join(sentences))}</p><p class=note>{html.escape(' '.join(model['reasons']))}</p>"


def pictures(at: Path) -> str:
    """Real held-out images, the same through the autoencoder, and each setting's samples."""
    sheets = [
        ("real images, held out", at / "evaluate" / "real.png"),
        ("the same, through the autoencoder", at / "evaluate" / "reconstructed.png"),
        *((f"generated: {folder.name}", folder / "grid.png") for folder in sorted((at / "sample").iterdir())),
    ]
    return f"<div class=pictures>{''.join(figure(name, file.read_bytes()) for name, file in sheets)}</div>"


def figure(caption: str, png: bytes) -> str:
    """A picture that travels inside the page."""
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f"<figure><img alt='{text}' src='data:image/png;base64,{data}'><figcaption>{text}</figcaption></figure>"


def metrics_table(metrics: dict[str, Any], details: dict[str, Any]) -> str:
    """Settings and floors side by side; a metric's count stands in the row's heading of the settings."""
    rows = {**{f"floor: {name}": row for name, row in metrics["floors"].items()}, **metrics["settings"]}
    names = list(dict.fromkeys(name.rpartition("_")[0] for row in rows.values() for name in row))
    counts = {title: next(iter(row)).rpartition("_")[2] for title, row in rows.items()}
    errors = {
        (title, record["metric"]): record.get("standard_error")
        for title, told in details["settings"].items()
        for record in told["records"]
    }
    head = "".join(f"<th>{html.escape(title)} ({counts[title]})</th>" for title in rows)
    lines = []
    for name in names:
        whole = ((title, f"{name}_{counts[title]}") for title in rows)
        cells = "".join(_cell(rows[title].get(full), errors.get((title, full))) for title, full in whole)
        lines.append(f"<tr><td>{name}</td>{cells}</tr>")
    floors = (
        "The floors tell what the figures mean: real images that training never saw, and the same images through the "
        "autoencoder."
        if metrics["floors"]
        else "There are no floors: too few images are held out."
    )
    note = (
        f"In the feature space of {html.escape(metrics['extractor'])}: comparable with figures of the same name and "
        f"reference. {floors} ± is one standard error: how far another draw of as many images would be expected to lie."
    )
    return f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table><p class=note>{note}</p>"


def trust(name: str, details: dict[str, Any], classes: list[str], at: Path) -> str:
    """What a setting's figures do not say by themselves: their bias, the classes that fail, and what may be copied."""
    parts = [f"<h3>{html.escape(name)}</h3>"]
    if bias := details["infinity"]:
        points = ", ".join(f"{value:.4g} of {size}" for size, value in bias["points"])
        parts.append(
            f"<p>{html.escape(bias['metric'])} is biased upwards by the number of images: {points}; of infinitely many "
            f"it would be about {bias['limit']:.4g} (± {bias['standard_error']:.2g} by the line's fit).</p>"
        )
    if details["classes"]:
        parts.append(class_table(details["classes"], classes))
    if copied := details["copies"]:
        parts.append(f"<p>{'<b>Warning.</b> ' if copied['warning'] else ''}{html.escape(copied['verdict'])}</p>")
        caption = "above: generated; below: the training image nearest to it; the closest pairs first"
        parts.append(figure(caption, (at / "evaluate" / f"{name}-nearest.png").read_bytes()))
    else:
        why = "evaluate.training_images is 0, or there are too few held-out images to compare with"
        parts.append(f"<p class=note>Copies of training images were not looked for: {why}.</p>")
    return "".join(parts)


def class_table(table: dict[str, dict[str, Any]], classes: list[str]) -> str:
    """The ten classes that are farthest from their real images, worst first."""
    scored = [(label, row) for label, row in table.items() if row["fid"] is not None or row["agreement"] is not None]
    worst = sorted(scored, key=lambda item: (-(item[1]["fid"] or 0), item[1]["agreement"] or 0))[:10]
    lines = []
    for label, row in worst:
        title = classes[int(label)] if int(label) < len(classes) else label
        cells = _cell(row["fid"]) + f"<td class=number>{_percent(row['agreement'])}</td>"
        lines.append(f"<tr><td>{html.escape(title)}</td>{cells}<td class=number>{row['num_images']}</td></tr>")
    head = "<tr><th>class</th><th>FID in the class</th><th>read as it</th><th>images</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"


def loss_curve(file: Path) -> str:
    """The training loss over steps, what its parts mean, and how often a step was skipped."""
    rows = read_losses(file)
    if not rows:
        return "<p class=note>Nothing was trained here.</p>"
    note = ""
    if any("loss_t1" in row for row in rows):
        note = "Thin: the same by quarters of time, from noise (0) to data (1). "
    if skipped := int(sum(row.get("skipped", 0) for row in rows)):
        note += f"{skipped} step{'s' * (skipped != 1)} had no finite loss or gradient and changed nothing."
    return loss_svg(file) + f"<p class=note>{note}</p>"


def lineage(told: dict[str, Any]) -> str:
    """What the model was made from: each identity with its owner."""
    checkpoint, run = told["checkpoint"], told["run"]
    rows = {
        "images (manifest)": checkpoint["data"]["digest"],
        "autoencoder": checkpoint["latents"]["autoencoder"],
        "its held-out PSNR": f"{told['vae'].get('heldout_psnr_db', '-')} dB",
        "latents": checkpoint["latents"]["digest"],
        "reference": told["reference"]["digest"],
        "evaluator's accuracy on held-out images": _percent(told["reference"].get("classifier_accuracy_heldout")),
        "judge's accuracy on training images": _percent(told["reference"].get("judge_accuracy_train")),
        "MLflow run": run["mlflow_run_id"] or "none",
        "trained on": f"{run['device']}, {run['threads']} threads, torch {run['torch']}",
        "licence of the weights": checkpoint["license"] or "yours",
    }
    cells = (f"<tr><td>{html.escape(k)}</td><td><code>{html.escape(str(v))}</code></td></tr>" for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def settings(checkpoint: dict[str, Any]) -> str:
    """What the checkpoint was made with, as it says itself: params.yaml may have changed since."""
    told = {part: checkpoint[part] for part in ("model", "objective", "training")}
    lines = [f"{part}.{name}: {json.dumps(value)}" for part, values in told.items() for name, value in values.items()]
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def _cell(value: float | None, error: float | None = None) -> str:
    digits = ".4f" if value is None or value == 0 or abs(value) >= 1e-3 else ".1e"  # KID's are that small
    shown = "" if value is None else f"{value:{digits}}" + ("" if error is None else f" ± {error:.2g}")
    return f"<td class=number>{shown}</td>"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    entry.main(report)
