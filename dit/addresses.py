"""How settings name a registered model: models:/NAME@ALIAS or models:/NAME/VERSION."""

import re

_REGISTERED = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")


def registered(spec: str, setting: str = "train.init_from") -> tuple[str, str | int] | None:
    """The name, and the alias or version, of a registered model; None for anything but models:.

    Raises ValueError, naming the setting, where it begins like one and is none.
    """
    if not spec.startswith("models:"):
        return None
    if not (match := _REGISTERED.fullmatch(spec)):
        raise ValueError(f"{setting}: {spec!r} is neither models:/NAME@ALIAS nor models:/NAME/VERSION")
    name, alias, number = match.groups()
    return name, alias or int(number)
