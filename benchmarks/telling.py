"""What a benchmark says in the end: on what it was measured, and its rows, as tables or with every measurement as JSON."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch


def tell(rows: Sequence[Any], *tables: str, as_json: bool, **about: Any) -> None:
    """Print the `tables`, or the `rows` (dataclasses) as JSON, under what they are `about`."""
    machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    about = machine | about
    if as_json:
        print(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print(", ".join(f"{key} {value}" for key, value in about.items()), *tables, sep="\n\n")
