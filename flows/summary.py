"""What a finished run shows: its metrics, what the registry decided, and where the report is, as Markdown.

Reads files only (`artifacts/evaluate/metrics.json`, `artifacts/register/model.json`): they are the truth, and a stage
that DVC took from its cache has them too. Each may be absent.
"""

import json
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
    rows = {**metrics.get("settings", {}), **{f"floor: {k}": v for k, v in metrics.get("floors", {}).items()}}
    rows = {name: values for name, values in rows.items() if isinstance(values, dict)}
    columns = list(dict.fromkeys(column for values in rows.values() for column in values))
    table = _table(["", *columns], [[name, *(_number(row.get(c)) for c in columns)] for name, row in rows.items()])
    facts = ", ".join(
        f"{k} {metrics[k]}" for k in ("extractor", "reference", "num_images") if metrics.get(k) is not None
    )
    return f"## Metrics\n\n{table}\n\n{facts}"


def _decision(model: dict[str, Any]) -> str:
    name, version, alias = model.get("name"), model.get("version"), model.get("alias")
    if version is None:
        line = f"{name or 'The model'} is not registered."
    else:
        line = f"{name}, version {version}" + (f", **@{alias}**" if alias else "") + "."
    reasons = model.get("reasons") or model.get("reason") or []
    reasons = [reasons] if isinstance(reasons, str) else reasons
    decision = [f"Decision: {model['decision']}"] if model.get("decision") else []
    return "\n".join(["## Registry", "", line, *(f"- {text}" for text in [*decision, *reasons])])


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
