"""What a finished run shows: its metrics, what the registry decided, and where the report is, as Markdown.

Reads files only (`artifacts/evaluate/metrics.json`, `artifacts/register/model.json`): they are the truth, and a stage
that DVC took from its cache has them too. Each may be absent.
"""

import json
import re
from pathlib import Path
from typing import Any


def markdown(root: Path, preset: str, results: dict[str, str]) -> str:
    """A page for Prefect's UI. `results` gives each stage's state and seconds, ready to print."""
    artifacts = root / "artifacts"
    parts = [f"# train-dit, preset {preset}"]
    if metrics := _read(artifacts / "evaluate" / "metrics.json"):
        parts += [_metrics(metrics)]
    if model := _read(artifacts / "register" / "model.json"):
        parts += [_decision(model)]
    report = artifacts / "report" / "index.html"
    if report.exists():
        parts += [f"Report: `{report.resolve()}`"]
    parts += ["## Stages", _table(["stage", "state"], [[name, state] for name, state in results.items()])]
    return "\n\n".join(parts) + "\n"


def _metrics(metrics: dict[str, Any]) -> str:
    """One column a setting or floor, one row a metric; the number of images stands in the column's head."""
    found = {**metrics.get("settings", {}), **{f"floor: {k}": v for k, v in metrics.get("floors", {}).items()}}
    columns: dict[str, dict[str, Any]] = {}
    for name, values in found.items():
        parts = {key: re.fullmatch(r"(.+)_(\d+k?)", key) for key in values}
        counts = {part[2] for part in parts.values() if part}
        head = f"{name} ({counts.pop()} images)" if len(counts) == 1 and all(parts.values()) else name
        columns[head] = {part[1] if part and head != name else key: values[key] for key, part in parts.items()}
    rows = dict.fromkeys(metric for values in columns.values() for metric in values)
    table = _table(["", *columns], [[row, *(_number(values.get(row)) for values in columns.values())] for row in rows])
    facts = ", ".join(f"{k}: {metrics[k]}" for k in ("extractor", "reference") if metrics.get(k) is not None)
    return f"## Metrics\n\n{table}\n\n{facts}"


def _decision(model: dict[str, Any]) -> str:
    name, version, alias = model.get("name"), model.get("version"), model.get("alias")
    if version is None:
        line = f"{name or 'The model'} is not registered."
    else:
        line = f"{name}, version {version}" + (f", **@{alias}**" if alias else "") + "."
    return "\n".join(["## Registry", "", line, *(f"- {reason}" for reason in model.get("reasons") or [])])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
