"""params.yaml as typed, validated sections.

A section is a frozen dataclass that lives beside its owner; a stage's signature names the sections it takes. Nothing
here knows an owner, so a stage depends on the sections it uses and on no others.
"""

import difflib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints


def read_params(path: Path) -> dict[str, Any]:
    """The content of params.yaml, read as YAML 1.2 (as DVC does: `1e-4` is a number)."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        params = YAML(typ="safe", pure=True).load(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} is not there: run in the project's folder, or make it with `dit preset digits`"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(params, dict):
        raise ValueError(f"{path} must hold sections (`train:` and so on), not {type(params).__name__}")
    return params


def sections_of(stage: Callable[..., Any]) -> dict[str, type]:
    """The sections that a stage's signature names: {"train": TrainConfig, ...}."""
    hints = get_type_hints(stage)
    return {name: hints[name] for name in inspect.signature(stage).parameters if name != "paths"}


def load(stage: Callable[..., Any], path: Path = Path("params.yaml")) -> dict[str, Any]:
    """The sections that `stage` takes, typed and validated.

    Raises ValueError with one line per fault: the setting's path (`train.lr`), what is wrong, and the nearest name
    where a key is unknown.
    """
    params = read_params(path)
    return {name: parse(name, params.get(name), kind, source=path.name) for name, kind in sections_of(stage).items()}


def check_sections(
    stages: Iterable[Callable[..., Any]],
    params: dict[str, Any],
    source: str = "params.yaml",
    optional: Mapping[str, type] | None = None,
) -> dict[str, Any]:
    """All sections of all stages, and the `optional` ones, which have their defaults where they are missing.

    Raises ValueError on any fault, sections that nobody takes included.
    """
    optional = optional or {}
    known = {name: kind for stage in stages for name, kind in sections_of(stage).items()} | dict(optional)
    faults, sections = [], {}
    for name in params:
        if name not in known and name != "preset":
            faults.append(f"{name}: no such section in {source}{nearest(str(name), known)}")
    for name, kind in known.items():
        try:
            values = {} if name in optional and name not in params else params.get(name)
            sections[name] = parse(name, values, kind, source=source)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return sections


def parse(name: str, values: Any, kind: type, source: str = "params.yaml") -> Any:
    """One section as an instance of its dataclass `kind`."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if values is None:
        raise ValueError(f"{name}: section missing from {source}")
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected settings below it in {source}, found {values!r}")
    _forbid_unknown(kind, ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
    try:
        # JSON and not Python mode: strict there still takes a list for a tuple and a whole number for a float.
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(name, kind, fault) for fault in error.errors())) from None


def digest(*parts: Any) -> str:
    """A short name for exactly these settings (sha256 of their canonical JSON, 16 hex digits)."""
    plain = [asdict(part) if is_dataclass(part) and not isinstance(part, type) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _forbid_unknown(kind: type, config: Any) -> None:
    kind.__pydantic_config__ = config
    for hint in get_type_hints(kind).values():
        for inner in (hint, *getattr(hint, "__args__", ())):
            if is_dataclass(inner):
                _forbid_unknown(inner, config)


def _explain(section: str, kind: type, fault: dict[str, Any]) -> str:
    # A setting of several kinds has them in its place: ("classes", "literal['natural','balanced']").
    where = ".".join([section, *(str(part) for part in fault["loc"] if "[" not in str(part))])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = _section_at(kind, fault["loc"][:-1])
        known = [field.name for field in fields(owner)] if owner else []
        return f"{where}: no such setting{nearest(str(fault['loc'][-1]), known, where.rpartition('.')[0] + '.')}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{where}: setting missing"
    if fault["type"] == "value_error":  # raised by the dataclass itself: starts with the field's name
        return f"{where}.{message}"
    if fault["type"].startswith("dataclass"):
        return f"{where}: expected settings below it, got {fault['input']!r}"
    return f"{where}: {message[0].lower()}{message[1:]}, got {fault['input']!r}"


def _section_at(kind: type, place: tuple[Any, ...]) -> type | None:
    """The dataclass of the nested settings at `place`: ("transport",), or ("settings", 0) for one of a list."""
    for name in place:
        if isinstance(name, str):
            hint = get_type_hints(kind).get(name)
            kind = next((part for part in (hint, *getattr(hint, "__args__", ())) if is_dataclass(part)), None)
            if kind is None:
                return None
    return kind


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """(did you mean ...?), or nothing where no name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""
