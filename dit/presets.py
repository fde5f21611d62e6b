"""Named settings: presets/NAME.yaml, each a full set or an overlay on another (`base: NAME`)."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit.config import nearest, read_params
from dit.paths import write_atomic
from dit.sources import content_hash

FULL = "digits"  # the preset that holds all settings


def names(folder: Path = Path("presets")) -> list[str]:
    """The presets that exist."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def headline(name: str, folder: Path = Path("presets")) -> str:
    """The first line of a preset's header."""
    return (folder / f"{name}.yaml").read_text().partition("\n")[0].removeprefix("#").strip()


def resolve(name: str, folder: Path = Path("presets"), above: tuple[str, ...] = ()) -> dict[str, Any]:
    """All settings of a preset, those of its base included. `name` may also be the path of a YAML file.

    `above`: the presets of which it is the base.
    """
    file = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not os.path.isfile(file):  # not Path's, which raises for a name that is too long
        raise ValueError(f"preset {name!r} does not exist: choose one of {', '.join(names(folder))}")
    overlay = read_params(file)
    base = overlay.pop("base", None)
    if base in (*above, name):
        raise ValueError(f"preset {name!r} has the base {base!r}, which rests on it")
    settings = resolve(str(base), folder, (*above, name)) if base else {}
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
    settings = merged(resolve(name, folder or params.parent / "presets"), overlay or {})
    held = current(params)
    if held == settings:
        return ""
    before, after = _rewritten(params, settings, empty=held is None)
    if write:
        write_atomic(params, after.encode())
        write_atomic(_record(params), content_hash(after.encode()).encode())
    return _difference(before, after, f"params.yaml ({name})")


def override(params: Path, settings: Sequence[str], *, write: bool = True) -> str:
    """Put settings such as `train.max_steps=1000` into params.yaml, keeping the comments there.

    The value is YAML; of a mapping what it names is replaced, as a preset does. Returns what changes as a unified diff.
    Raises ValueError, a line for each fault, where a path is neither params.yaml's nor the full preset's: nothing is
    written then.
    """
    held, presets = read_params(params), params.parent / "presets"
    known = merged(resolve(FULL, presets), held) if FULL in names(presets) else held
    wanted, faults = held, []
    for text in settings:
        try:
            wanted = merged(wanted, _parsed(text, known))
        except ValueError as error:
            faults.append(f"set: {error}")
    if faults:
        raise ValueError("\n".join(faults))
    before, after = _rewritten(params, wanted)
    if write and before != after:
        write_atomic(params, after.encode())
    return _difference(before, after, "params.yaml (set)")


def _parsed(text: str, known: dict[str, Any]) -> dict[str, Any]:
    """`a.b=value` as {"a": {"b": value}}; `known` are the settings that there are."""
    path, equals, value = text.partition("=")
    path, names = path.strip(), path.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"{text!r} is no setting and its value: write it as train.max_steps=1000")
    if path == "preset":
        raise ValueError("preset: a run's preset is asked for by its own name, not as a setting")
    if not value.strip():
        raise ValueError(f"{path}: no value after the =: to take one away, write null")
    told = parse_value(value, path)
    for name in reversed(names):
        told = {name: told}
    _require_known(told, known)
    return told


def parse_value(text: str, path: str) -> Any:
    """A value in YAML 1.2, as in params.yaml. Raises ValueError, one line that begins with `path`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ValueError(f"{path}: {text.strip()!r} is not readable YAML ({getattr(error, 'problem', '')})") from None


def _require_known(told: dict[str, Any], known: dict[str, Any], prefix: str = "") -> None:
    for key, value in told.items():
        path = f"{prefix}{key}"
        if key not in known:
            raise ValueError(f"{path}: no such {'setting' if prefix else 'section'}{nearest(str(key), known, prefix)}")
        if isinstance(known[key], dict):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{path}: this is a section: name a setting in it, such as {path}.{next(iter(known[key]))}"
                )
            _require_known(value, known[key], f"{path}.")
        elif isinstance(value, dict):
            raise ValueError(f"{path}.{next(iter(value), '')}: no such setting, since {path} is one itself")


def _rewritten(params: Path, settings: dict[str, Any], *, empty: bool = False) -> tuple[str, str]:
    """The text of params.yaml as it is, and as it is with these settings. `empty`: it holds nothing but comments."""
    from io import StringIO

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 120, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    before = params.read_text() if params.is_file() else ""
    document = {} if empty else yaml.load(before)
    _replace(document, settings)
    stream = StringIO()
    yaml.dump(document, stream)
    return before, stream.getvalue()


def _difference(before: str, after: str, name: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "params.yaml", name, lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith("@@"))


def current(params: Path) -> dict[str, Any] | None:
    """What params.yaml holds; None where it is not there, or holds nothing but comments. Raises ValueError."""
    if not params.is_file():
        return None
    lines = [line.strip() for line in params.read_text(errors="replace").splitlines()]
    if all(line.startswith("#") or line in ("", "---") for line in lines):
        return None
    return read_params(params)


def written_by_apply(params: Path) -> bool:
    """Whether params.yaml is as `apply` left it, to the last byte."""
    record = _record(params)
    return record.is_file() and record.read_text() == content_hash(params.read_bytes())


def _record(params: Path) -> Path:
    return params.parent / "scratch" / "params.sha256"


def _replace(mapping: Any, values: dict[str, Any]) -> None:
    """Make a mapping of the document hold exactly `values`, leaving what is equal as it stands."""
    # The lines after a mapping hang on its last key: they are set aside, and hung on what is last in the end.
    below = _take_below(mapping, list(mapping)[-1]) if mapping else ""
    kept = None
    for key in list(mapping):
        if key in values:
            kept = key
            continue
        orphaned = _take_below(mapping, key)
        del mapping[key]
        if kept is not None:
            _hang_below(mapping, kept, orphaned)
        else:
            below = orphaned + below
    for key, value in values.items():
        _set(mapping, key, value)
    if values:
        _hang_below(mapping, list(mapping)[-1], below)


def _set(mapping: Any, key: str, value: Any) -> None:
    # An equal value is left as it stands: its notation and its comment are the person's.
    old = mapping.get(key)
    if isinstance(old, dict) and isinstance(value, dict) and old and value:
        return _replace(old, value)
    if key in mapping and old == value and type(old) is not bool and type(value) is not bool:
        return
    if isinstance(old, list) and isinstance(value, list) and old and value and isinstance(old[-1], dict):
        _set_list(old, value)
    elif isinstance(old, list) and isinstance(value, list):
        old[:] = value  # in the notation that it has: [8, 16, 32] on one line
    else:
        below = _take_below(mapping, key) if key in mapping else ""
        in_braces = hasattr(mapping, "fa") and mapping.fa.flow_style()
        # DVC's parser does not take {vae: models:/name/3} without quotes.
        mapping[key] = _quoted(value) if in_braces and isinstance(value, str) and ":" in value else _commented(value)
        _hang_below(mapping, key, below)


def _quoted(value: str) -> Any:
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    return DoubleQuotedScalarString(value)


def _commented(value: Any) -> Any:
    """Settings as nodes that comments can hang on; what is in a list stands on one line."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    if isinstance(value, dict):
        return CommentedMap({key: _commented(inner) for key, inner in value.items()})
    if not isinstance(value, list):
        return value
    node = CommentedSeq(_flow_mapping(item) if isinstance(item, dict) else item for item in value)
    if not any(isinstance(item, dict) for item in value):
        node.fa.set_flow_style()
    return node


def _place(mapping: Any, key: Any) -> tuple[Any, Any, int] | None:
    """Where ruamel keeps the comment after the last line of a key: the node, its key, and the position there."""
    node, position = mapping, 2
    while hasattr(node, "ca"):
        inner = node[key]
        block = isinstance(inner, dict | list) and hasattr(inner, "fa") and not inner.fa.flow_style()
        if not (block and inner):
            return node, key, position
        mapped = isinstance(inner, dict)
        node, key, position = inner, list(inner)[-1] if mapped else len(inner) - 1, 2 if mapped else 0
    return None


def _take_below(mapping: Any, key: Any) -> str:
    """Cut off and return the lines below a key, up to the next one; the comment beside it stays."""
    place = _place(mapping, key)
    tokens = place[0].ca.items.get(place[1]) if place else None
    if not tokens or tokens[place[2]] is None:
        return ""
    token = tokens[place[2]]
    beside, _, below = token.value.partition("\n")
    if beside:
        token.value = beside + "\n"
    else:
        tokens[place[2]] = None
    return below


def _hang_below(mapping: Any, key: Any, below: str) -> None:
    """Put lines below a key, after those that are there."""
    from ruamel.yaml.error import CommentMark
    from ruamel.yaml.tokens import CommentToken

    if not below or (place := _place(mapping, key)) is None:
        return
    node, key, position = place
    tokens = node.ca.items.setdefault(key, [None, None, None, None])
    if tokens[position] is None:
        tokens[position] = CommentToken("\n", CommentMark(0), None)
    tokens[position].value += below


def _flow_mapping(values: dict[str, Any]) -> Any:
    from ruamel.yaml.comments import CommentedMap

    mapping = CommentedMap(values)
    mapping.fa.set_flow_style()  # {name: plain, ...} on one line, as a person writes it
    return mapping


def _set_list(old: Any, new: list[dict[str, Any]]) -> None:
    # The comment after a list hangs on its last item: that one stays, and takes on the last new item's values.
    while len(old) > len(new):
        del old[0]
    while len(old) < len(new):
        old.insert(0, _flow_mapping({}))
    for before, after in zip(old, new, strict=True):
        _replace(before, after)
