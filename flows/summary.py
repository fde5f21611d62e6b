"""A run's last page: what came of it, its pictures, its figures beside the champion's, its cost, where all of it lies.

Made of files only, which are the truth whatever services run: artifacts/ (a stage that DVC took from its cache has them
too), scratch/outcome (how long each stage took), scratch/preflight.json (the device and its price). Each may be absent.
What later pages need is kept in the home checkout's scratch/reports: the report, which the run's worktree takes along
when it is removed, and the figures of each registered version, for the day it is the champion.
"""

import base64
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from dit import store
from dit.paths import Paths, write_atomic, write_json
from dit.progress import clock

REPORTS_KEPT = 50
PICTURES = 4  # at most, one a sample setting
SIDE = 512  # pixels of a picture at most: a page travels through Prefect's database
SMALL_SIDE = 256  # what is smaller than this is enlarged
FINISHED = ("Completed", "Cached")


class StageState(Protocol):
    """What is known of a stage's end: a Prefect State."""

    name: str | None
    message: str | None


class Place(Protocol):
    """Where a run works (`workplace.Workplace`)."""

    root: Path
    home: Path
    branch: str
    label: str
    say: Callable[[str], None]


def publish(place: Place, title: str, states: Mapping[str, StageState], failure: str = "") -> None:
    """Show the run's page in Prefect, as an artifact named `title`; `failure` says why it stopped. Never fails."""
    from flows import display

    heading = f"{title}, {place.label}" + (" stopped" if failure else "")
    try:
        memory = place.home / "scratch" / "reports"
        report = None if failure else keep(place.root, memory, place.branch)
        text = page(place.root, heading, states, failure=failure, memory=memory, report=report, branch=place.branch)
    except Exception as error:  # of whatever kind: the run's result does not hang on its picture
        text = f"# {heading}\n\n{_block(failure)}\n\n{_stages(states)}\n"
        place.say(f"the run's page lacks what files would tell ({type(error).__name__}: {error})")
    display.show_page(title, text, "why it stopped" if failure else "pictures, figures, registry, cost", place.say)


def keep(root: Path, memory: Path, name: str) -> Path | None:
    """Keep what must outlive the worktree; returns the report's copy. The oldest go beyond REPORTS_KEPT."""
    model, metrics = _read(root, "register/model.json"), _read(root, "evaluate/metrics.json")
    if model.get("version") and (row := metrics.get("settings", {}).get(model.get("setting"))):
        write_json(_figures(memory, model["name"], model["version"]), row)
    report = root / "artifacts" / "report" / "index.html"
    if not report.exists():
        return None
    kept = memory / f"{name.removeprefix('runs/').replace('/', '-')}.html"
    write_atomic(kept, report.read_bytes())
    for old in sorted(memory.glob("*.html"), key=lambda file: file.stat().st_mtime)[:-REPORTS_KEPT]:
        old.unlink(missing_ok=True)
    return kept


def page(
    root: Path,
    heading: str,
    states: Mapping[str, StageState],
    *,
    failure: str = "",
    memory: Path | None = None,
    report: Path | None = None,
    branch: str = "",
) -> str:
    """The page, in Markdown. Of a run that stopped it shows only what this run's own stages finished."""

    def finished(stage: str) -> bool:
        return not failure or (stage in states and states[stage].name in FINISHED)

    def of(stage: str, file: str) -> dict[str, Any]:
        return _read(root, f"{stage}/{file}") if finished(stage) else {}

    metrics, model, run = of("evaluate", "metrics.json"), of("register", "model.json"), of("train", "run.json")
    parts = [
        f"# {heading}",
        _block(failure),
        _decision(model),
        _pictures(root / "artifacts" / "sample", model.get("setting")) if finished("sample") else "",
        _beside_champion(metrics, model, memory),
        _metrics(metrics),
        _cost(root / "scratch", states),
        _links(root, model, run, report, branch),
        _stages(states),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _block(text: str) -> str:
    """Other people's words, as they are."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text.strip()}\n{fence}" if text else ""


def _decision(model: dict[str, Any]) -> str:
    if not model:
        return ""
    name, version, alias = model.get("name"), model.get("version"), model.get("alias")
    if version is None:
        line = f"{name or 'The model'} is not registered."
    else:
        line = f"{name}, version {version}" + (f", **@{alias}**" if alias else "") + "."
    return "\n".join([line, "", *(f"- {reason}" for reason in model.get("reasons") or [])]).strip()


def _pictures(samples: Path, first: str | None) -> str:
    """The grids of the sample settings, side by side, inside the page itself."""
    grids = sorted(samples.glob("*/grid.png"), key=lambda file: (file.parent.name != first, file.parent.name))
    if not (grids := grids[:PICTURES]):
        return ""
    shown = [f"![samples]({_picture(file)})" for file in grids]
    return _table([file.parent.name for file in grids], [shown])


def _picture(file: Path) -> str:
    """A data URI, which Prefect's pages show (of PNG, WebP and AVIF)."""
    from PIL import Image

    with Image.open(file) as picture:
        picture = picture.convert("RGB")
    side = max(picture.size)
    if side > SIDE:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    elif side < SMALL_SIDE:
        factor = -(-SMALL_SIDE // side)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _beside_champion(metrics: dict[str, Any], model: dict[str, Any], memory: Path | None) -> str:
    """The deciding setting's figures beside the champion's, as far as both were measured on the same terms."""
    name, setting = model.get("metric"), model.get("setting")
    ours = metrics.get("settings", {}).get(setting, {})
    number, value = model.get("champion_version"), model.get("champion_value")
    if value is None or number == model.get("version"):
        return ""
    theirs = _recall(memory, model["name"], number)
    if theirs.get(name) != value:  # another registry's version of that number, or scored again on other terms
        theirs = {name: value}
    ours = {name: model.get("value"), **ours}
    rows = [[f"**{row}**" if row == name else row, *_change(ours[row], theirs[row])] for row in ours if row in theirs]
    note = "" if len(rows) > 1 else "\n\nOnly the figure that decides is known of the champion on the same terms."
    head = [f"{setting}", "this run", f"champion, version {number}", "change"]
    return f"## Beside the champion\n\n{_table(head, rows)}{note}"


def _change(ours: float | None, theirs: float) -> list[str]:
    change = f"{(ours - theirs) / abs(theirs):+.1%}" if ours is not None and theirs else ""
    return [_number(ours), _number(theirs), change]


def _metrics(metrics: dict[str, Any]) -> str:
    """One column a setting or floor, one row a metric; the number of images stands in the column's head."""
    found = {**metrics.get("settings", {}), **{f"floor: {k}": v for k, v in metrics.get("floors", {}).items()}}
    if not found:
        return ""
    columns: dict[str, dict[str, Any]] = {}
    for name, values in found.items():
        parts = {key: re.fullmatch(r"(.+)_(\d+k?)", key) for key in values}
        counts = {part[2] for part in parts.values() if part}
        head = f"{name} ({counts.pop()} images)" if len(counts) == 1 and all(parts.values()) else name
        columns[head] = {part[1] if part and head != name else key: values[key] for key, part in parts.items()}
    rows = dict.fromkeys(metric for values in columns.values() for metric in values)
    table = _table(["", *columns], [[row, *(_number(values.get(row)) for values in columns.values())] for row in rows])
    facts = ", ".join(f"{k}: {metrics[k]}" for k in ("extractor", "reference") if metrics.get(k) is not None)
    return f"## Metrics\n\n{table}\n\n{facts}".strip()


def _cost(scratch: Path, states: Mapping[str, StageState]) -> str:
    """How long the stages worked that ran here, on what, for about how much."""
    ran = [name for name, state in states.items() if state.name != "Cached"]
    seconds = sum(_load(scratch / "outcome" / f"{name}.json").get("seconds") or 0.0 for name in ran)
    if not seconds:
        return ""
    told = _load(scratch / "preflight.json")
    count, price = told.get("devices") or 1, told.get("price_usd_per_hour")
    line = f"Stages worked for {clock(seconds)}"
    if device := told.get("device"):
        line += f" on {f'{count} x ' if count > 1 else ''}{device}"
    if price:
        line += (
            f": about **${seconds / 3600 * count * price:,.2f}** at ${price:,.2f} an hour{' each' if count > 1 else ''}"
        )
    if hours := told.get("hours"):
        line += f" (foreseen: {clock(hours * 3600)})"
    return f"## Cost\n\n{line}."


def _links(root: Path, model: dict[str, Any], run: dict[str, Any], report: Path | None, branch: str) -> str:
    lines = []
    if identity := model.get("run_id") or run.get("mlflow_run_id"):
        uri = _without_password(store.tracking_uri(Paths(root)))
        if uri.startswith("http"):
            lines += [f"[MLflow run {identity}]({uri}/#/runs/{identity})"]
            if model.get("version"):
                place = f"{uri}/#/models/{model['name']}/versions/{model['version']}"
                lines += [f"[{model['name']}, version {model['version']}]({place})"]
        else:
            lines += [f"MLflow run `{identity}` in `{uri}`: `dit up` shows it"]
    if report:  # browsers follow no link from a server's page to a file
        lines += [f"Report: open `{report.resolve().as_uri()}`"]
    if branch:
        lines += [f"Into the checkout: `dit adopt {branch.rpartition('/')[2]}` (branch `{branch}`)"]
    return "## Where it is\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/") if parts.netloc else uri


def _stages(states: Mapping[str, StageState]) -> str:
    rows = [[name, state.name or "", (state.message or "").partition("\n")[0]] for name, state in states.items()]
    return f"## Stages\n\n{_table(['stage', 'state', ''], rows)}" if rows else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _figures(memory: Path, name: str, version: int) -> Path:
    return memory / f"{name}-{version}.json"


def _recall(memory: Path | None, name: str, version: int) -> dict[str, Any]:
    return _load(_figures(memory, name, version)) if memory else {}


def _read(root: Path, artifact: str) -> dict[str, Any]:
    return _load(root / "artifacts" / artifact)


def _load(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
