"""What a study finds: of each variant its Gflops, known before it runs, and the figures that its run ends with.

A figure comes out of the run's branch (`artifacts/evaluate/metrics.json`, as its dvc.lock names it), wherever the run
was made; Gflops are `dit info`'s, of the variant's params.yaml.
"""

import base64
import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import State

from dit import presets
from dit.config import read_params
from dit.paths import replacing, write_json
from flows import chart, worktrees
from flows.chart import Point
from flows.dag import dvc_environment
from flows.workplace import Wanted

METRICS = "artifacts/evaluate/metrics.json"
LOWER_IS_BETTER = ("fid", "sfid", "kid")


@dataclass(frozen=True)
class Finding:
    """One variant: what is known of it before its run, and after.

    `figure` is the registry's metric under its full name, None as long as there is none; `others` are that setting's
    other metrics. `stage_settings` has the settings that each stage of dvc.yaml depends on.
    """

    name: str
    gflops: float
    parameters: int
    family: str
    metric: str  # register.metric, and of which setting
    setting: str
    stage_settings: dict[str, Any] = field(repr=False, default_factory=dict)
    figure: tuple[str, float] | None = None
    others: dict[str, float] = field(default_factory=dict)
    branch: str = ""
    state: str = "not run"
    reason: str = ""


def expect(home: Path, run_id: str, wanted: Mapping[str, Wanted]) -> dict[str, Finding]:
    """What is known of the variants before any runs. Raises ValueError, a line for each variant that can't run."""
    tree = worktrees.describe(home, run_id, "study-plan")
    worktrees.open_worktree(tree)
    params = tree.root / "params.yaml"
    held, found, faults = params.read_bytes() if params.exists() else None, {}, []
    try:
        for name, one in wanted.items():
            if held is not None:
                params.write_bytes(held)
            try:
                if one.preset:
                    presets.apply(one.preset, params, tree.root / "presets")
                presets.override(params, one.overrides)
                found[name] = _expected(name, tree.root)
            except ValueError as error:
                faults += [f"variant {name}: {line}" for line in str(error).splitlines()]
    finally:
        worktrees.close(tree)
        worktrees.git(home, "branch", "-q", "-D", tree.branch)
    if faults:
        raise ValueError("\n".join(faults))
    return found


def gather(home: Path, finding: Finding, branch: str, state: State) -> Finding:
    """A finding with what its run ended with: figures, or the reason why there are none."""
    known = replace(
        finding, branch=branch, state=state.name or "", reason="" if state.is_completed() else state.message
    )
    if not state.is_completed():
        return known
    kept = home / "scratch" / "studies" / f"{branch.replace('/', '-')}.metrics.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = worktrees.dvc(home, "get", str(home), METRICS, "--rev", branch, "--force", "-o", str(kept))
        figures = json.loads(kept.read_text())["settings"][finding.setting]
        name = figure_named(figures, finding.metric)
    except (OSError, ValueError, KeyError) as error:
        why = (done.stderr.strip().splitlines() or [str(error)])[-1]
        return replace(known, state="NoMetrics", reason=f"{METRICS} of {branch} is not to be had: {why}")
    finally:
        kept.unlink(missing_ok=True)
    others = {key: value for key, value in figures.items() if key != name}
    return replace(known, figure=(name, float(figures[name])), others=others)


def figure_named(figures: Mapping[str, float], metric: str) -> str:
    """The full name that a metric has among a setting's figures: fid -> fid_digits_classifier_1k. Raises KeyError."""
    kind, pooled, _ = metric.partition("_pooled")
    for name in figures:
        if name == metric or (name.startswith(f"{kind}_") and ("_pooled_" in name) == bool(pooled)):
            return name
    raise KeyError(metric)


def line(finding: Finding) -> str:
    """How a variant ended, for the log."""
    if finding.figure is None:
        return f"{finding.state}: {finding.reason}"
    return f"{finding.figure[0]} {finding.figure[1]:.4g}"


def best(done: Sequence[Finding]) -> str:
    """Words on the best of those that have a figure."""
    if not done:
        return ""
    one = min(done, key=lambda finding: finding.figure[1] * (1 if _lower(finding) else -1))
    return f"best: {one.name}, {line(one)}; "


def publish(folder: Path, title: str, found: Sequence[Finding]) -> None:
    """Write study.json, study.csv and study.png into the folder, and show table and chart as artifacts of the run."""
    rows = [_row(finding) for finding in found]
    write_json(folder / "study.json", {"title": title, "variants": rows})
    with replacing(folder / "study.csv") as unfinished, open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    create_table_artifact(key="study", table=rows, description=f"study {title}")
    names = Counter(finding.figure[0] for finding in found if finding.figure)
    if not names:
        return
    (metric, _), *others = names.most_common()
    shown = [finding for finding in found if finding.figure and finding.figure[0] == metric]
    kind = shown[0].metric.partition("_pooled")[0]
    kind = kind.upper().replace("SFID", "sFID") if kind in LOWER_IS_BETTER else kind.replace("_", " ")
    chart.bubbles(
        [Point(finding.name, finding.gflops, finding.figure[1], finding.family) for finding in shown],
        folder / "study.png",
        title=f"{title}: {kind} over Gflops",
        metric=metric,
        lower_is_better=_lower(shown[0]),
        note=f"{len(shown)} variants, setting {shown[0].setting}",
    )
    picture = base64.b64encode((folder / "study.png").read_bytes()).decode()
    text = [f"# Study {title}", f"![{kind} over Gflops](data:image/png;base64,{picture})", _table(found)]
    if others:
        text.append(f"Not in the chart, since not comparable: {', '.join(name for name, _ in others)}.")
    text.append(f"Kept in `{folder}`: study.png, study.csv, study.json. Adopt a variant with `dit adopt RUN`.")
    create_markdown_artifact(key="study-chart", markdown="\n\n".join(text), description=f"study {title}")


def _expected(name: str, root: Path) -> Finding:
    """What `dit info` says of the params.yaml there. Raises ValueError with its words."""
    command = [sys.executable, "-m", "dit.cli", "info", "params", "--json"]
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=root, env=dvc_environment(), **quiet)
    if done.returncode != 0:
        told = (done.stderr or done.stdout).strip().replace("dit: ", "") or "dit info says nothing"
        raise ValueError(told)
    network, params = json.loads(done.stdout)["models"][0], read_params(root / "params.yaml")
    model, register = params.get("model") or {}, params.get("register") or {}
    named = str(model.get("name") or "custom")
    family = f"{network['depth']} blocks of {network['hidden_size']}" if named == "custom" else named.partition("/")[0]
    return Finding(
        name,
        gflops=network["gflops"],
        parameters=network["parameters"],
        family=family,
        metric=str(register.get("metric", "fid")),
        setting=str(register.get("setting")),
        stage_settings={
            stage: _settings(params, told.get("params") or [])
            for stage, told in read_params(root / "dvc.yaml")["stages"].items()
        },
    )


def _settings(params: dict[str, Any], names: Sequence[Any]) -> dict[str, Any]:
    """The values of the settings that a stage names in dvc.yaml; of another file than params.yaml, its name."""
    found = {}
    for name in names:
        value: Any = params
        for part in name.split(".") if isinstance(name, str) else ():
            value = value.get(part) if isinstance(value, dict) else None
        found[str(name)] = value
    return found


def _row(finding: Finding) -> dict[str, Any]:
    row = {"variant": finding.name, "Gflops": finding.gflops, "parameters": finding.parameters}
    figures = dict([finding.figure]) | finding.others if finding.figure else {}
    return row | figures | {"state": finding.state, "reason": finding.reason, "branch": finding.branch}


def _table(found: Sequence[Finding]) -> str:
    head = ["variant", "Gflops", "parameters", "figure", "state", "branch"]
    lines = [head, ["---"] * len(head)]
    for one in found:
        figure = f"{one.figure[0]} **{one.figure[1]:.4g}**" if one.figure else one.reason.partition("\n")[0]
        lines.append([one.name, f"{one.gflops:.4g}", f"{one.parameters:,}", figure, one.state, one.branch])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def _lower(finding: Finding) -> bool:
    return finding.metric.partition("_")[0] in LOWER_IS_BETTER
