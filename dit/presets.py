"""Named settings: presets/NAME.yaml, each a full set or an overlay on another (`base: NAME`)."""

import difflib
from pathlib import Path
from typing import Any

from dit.config import read_params
from dit.paths import write_atomic


def names(folder: Path = Path("presets")) -> list[str]:
    """The presets that exist."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def headline(name: str, folder: Path = Path("presets")) -> str:
    """The first line of a preset's header."""
    return (folder / f"{name}.yaml").read_text().partition("\n")[0].removeprefix("#").strip()


def resolve(name: str, folder: Path = Path("presets")) -> dict[str, Any]:
    """All settings of a preset, those of its base included. `name` may also be the path of a YAML file."""
    file = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not file.is_file():
        raise ValueError(f"preset {name!r} does not exist: choose one of {', '.join(names(folder))}")
    overlay = read_params(file)
    base = overlay.pop("base", None)
    settings = resolve(base, folder) if base else {}
    return {**merged(settings, overlay), "preset": file.stem}


def merged(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """`base` with what `overlay` says in its place, section by section and setting by setting however deep."""
    result = dict(base)
    for key, value in overlay.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if nested else value
    return result


def apply(
    name: str,
    params: Path = Path("params.yaml"),
    folder: Path | None = None,
    *,
    overlay: dict[str, Any] | None = None,
    write: bool = True,
) -> str:
    """Put a preset, and what `overlay` says in its place, into params.yaml, keeping the comments there.

    Returns what changes as a unified diff ('' if nothing).
    """
    from io import StringIO

    from ruamel.yaml import YAML

    settings = merged(resolve(name, folder or params.parent / "presets"), overlay or {})
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 120, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    before = params.read_text() if params.is_file() else ""
    if before.strip():
        if read_params(params) == settings:
            return ""
    document = yaml.load(before) or {}
    _replace(document, settings)
    stream = StringIO()
    yaml.dump(document, stream)
    after = stream.getvalue()
    if write:
        write_atomic(params, after.encode())
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "params.yaml", f"params.yaml ({name})", lineterm="", n=0
    )
    return "\n".join(line for line in lines if not line.startswith("@@"))


def _replace(mapping: Any, values: dict[str, Any]) -> None:
    """Make a mapping of the document hold exactly `values`, leaving what is equal as it stands."""
    for gone in [key for key in mapping if key not in values]:
        del mapping[gone]
    for key, value in values.items():
        _set(mapping, key, value)


def _set(mapping: Any, key: str, value: Any) -> None:
    # An equal value is left as it stands: its notation and its comment are the person's.
    old = mapping.get(key)
    if isinstance(old, dict) and isinstance(value, dict):
        return _replace(old, value)
    if key in mapping and old == value and type(old) is not bool and type(value) is not bool:
        return
    if isinstance(old, list) and isinstance(value, list) and old and value and isinstance(old[-1], dict):
        _set_list(old, value)
    elif isinstance(old, list) and isinstance(value, list):
        old[:] = value  # in the notation that it has: [8, 16, 32] on one line
    else:
        mapping[key] = value


def _flow_mapping() -> Any:
    from ruamel.yaml.comments import CommentedMap

    mapping = CommentedMap()
    mapping.fa.set_flow_style()  # {name: plain, ...} on one line, as a person writes it
    return mapping


def _set_list(old: Any, new: list[dict[str, Any]]) -> None:
    # The comment after a list hangs on its last item: that one stays, and takes on the last new item's values.
    while len(old) > len(new):
        del old[0]
    while len(old) < len(new):
        old.insert(0, _flow_mapping())
    for before, after in zip(old, new, strict=True):
        _replace(before, after)
