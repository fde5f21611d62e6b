"""What a run reaches for, tried before it begins: the source, weights, the DVC remote, room on the disk.

Each function gives its faults as lines for a person. Nothing is brought; of a large source no more is listed than a few
seconds allow.
"""

import json
import os
import shutil
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit.addresses import registered
from dit.paths import Paths
from dit.places import OutOfReach
from dit.reuse import cache_folder
from dit.sources import SUFFIXES, DataConfig, read_listing
from dit.staleness import DVC_SECONDS, dvc

COUNT_SECONDS = 5.0
PROBE_SECONDS = 5
HUB = "https://huggingface.co"


def remote(root: Path) -> list[str]:
    """Why the default DVC remote, if there is one, does not answer."""
    listed = dvc(root, "config", "--list")
    lines = listed.stdout.splitlines() if listed and not listed.returncode else []
    settings = dict(line.split("=", 1) for line in lines if "=" in line)
    name = settings.get("core.remote")
    url = settings.get(f"remote.{name}.url")
    if not name or not url:
        return []
    if "://" not in url:  # a folder, which the first push makes
        there = next(folder for folder in (Path(url), *Path(url).parents) if folder.exists())
        if there.is_dir() and os.access(there, os.W_OK):
            return []
        return [f"DVC remote {name}: {url} cannot be written: grant it, or `dvc remote modify {name} url` another"]
    answer = dvc(root, "list-url", f"remote://{name}/")
    if answer is None:
        return [f"DVC remote {name}: {url} did not answer within {DVC_SECONDS} s"]
    said = next((line for line in answer.stderr.splitlines() if line.startswith("ERROR: ")), "")
    # A prefix under which nothing lies yet "does not exist", without any reason behind it: the bucket does.
    if answer.returncode == 0 or _only_empty(said):
        return []
    reason = said.removeprefix("ERROR: ").removeprefix("unexpected error - ") or "no reason given"
    return [f"DVC remote {name}: {url} is out of reach ({reason}): correct it or the network, or start with --no-push"]


def _only_empty(said: str) -> bool:
    _, found, reason = said.partition(" does not exist: ")
    return bool(found) and ": " not in reason


def source(data: DataConfig, paths: Paths, faults: list[str]) -> tuple[int | None, str]:
    """How many images data.source holds, and that in words; None where a look does not tell.

    Why there are none to be had is added to `faults`.
    """
    from dit import storage
    from dit.files import Files, open_source

    last = _last_count(data, paths)
    try:
        opened = open_source(data, bucket=storage.Bucket, given=paths.given)
        if not isinstance(opened, Files):
            count = len(opened.look(data.labels).images)
            return count, f"{count:,} images"
        count, others, whole = _count(opened.place.files())
    except (ValueError, OutOfReach, OSError) as error:
        faults.append(str(error).splitlines()[0])
        return last, "images out of reach" if last is None else f"{last:,} images at the last scan"
    if whole and not count and not others:
        faults.append(f"data.source: no PNG, JPEG or WebP image in {data.source!r}: put some there")
    if last is not None and (others or not whole):
        return last, f"{last:,} images at the last scan"
    if not whole:
        return None, f"more than {count:,} images"
    return count, f"{count:,} images{' and those in archives' * others}"


def _count(files: Any) -> tuple[int, bool, bool]:
    """Images, whether there are archives too, and whether that is all there is."""
    from dit.archives import is_archive

    count, archives, end = 0, False, time.monotonic() + COUNT_SECONDS
    for file in files:
        if file.name.lower().endswith(SUFFIXES):
            count += 1
        elif is_archive(file.name):
            archives = True
        if time.monotonic() > end:
            return count, archives, False
    return count, archives, True


def _last_count(data: DataConfig, paths: Paths) -> int | None:
    try:
        listing = read_listing(paths.artifacts / "scan" / "listing.json")
    except (OSError, ValueError):
        return None
    return len(listing.rows) if (listing.source, listing.labels) == (data.source, data.labels) else None


def autoencoder(pretrained: str | None, paths: Paths) -> list[str]:
    """Why the stage vae could not have a pretrained autoencoder: a folder that is none, or a hub out of reach."""
    from dit.vae import CONFIG, WEIGHTS

    if pretrained is None:
        return []
    if pretrained.startswith("models:"):
        return registered_model(pretrained, paths, "vae.pretrained")
    folder = paths.given(pretrained)
    if folder.is_dir():
        folder = folder / "vae" if (folder / "vae").is_dir() and not (folder / CONFIG).is_file() else folder
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        return [f"vae.pretrained: {pretrained} has no {missing[0]}: bring it there"] if missing else []
    if Path(pretrained).expanduser().is_absolute():
        return [f"vae.pretrained: the folder {pretrained} is not there"]
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if all(isinstance(try_to_load_from_cache(pretrained, name), str) for name in (CONFIG, WEIGHTS)):
            return []
    except HFValidationError:
        return [f"vae.pretrained: {pretrained!r} is neither a folder nor a hub id"]
    address = f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/{pretrained}/resolve/main/{CONFIG}"
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PROBE_SECONDS).close()
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        return [
            f"vae.pretrained: {pretrained!r} is no folder here, is not in the hub's cache, and {address} cannot be "
            f"reached ({reason}): bring {CONFIG} and {WEIGHTS} into a folder and name that"
        ]
    return []


def autoencoder_config(pretrained: str | None, paths: Paths) -> dict[str, Any] | None:
    """The config.json of a pretrained autoencoder that lies in a folder, or has been copied already."""
    if pretrained is None:
        return None
    if named := registered(pretrained, "vae.pretrained"):
        folders = sorted((paths.memory / "autoencoders").glob(f"{named[0]}-{named[1]}-*"))
    else:
        folders = [paths.given(pretrained), paths.given(pretrained) / "vae"]
    for file in (folder / "config.json" for folder in (*folders, paths.artifacts / "vae")):
        try:
            told = json.loads(file.read_text())
            return told if isinstance(told.get("block_out_channels"), list) else None
        except (OSError, ValueError, AttributeError):
            continue
    return None


def registered_model(spec: str, paths: Paths, setting: str = "train.init_from") -> list[str]:
    """Why the registered model that a setting names is not to be had; folders are looked at by `dit check`."""
    from dit import store, tracking

    named = registered(spec, setting)
    if named is None:
        return []
    name, which = named
    try:
        with store.translated():
            client = tracking.connect(paths, timeout_seconds=PROBE_SECONDS)
            if isinstance(which, int):
                client.get_model_version(name, str(which))
            else:
                client.get_model_version_by_alias(name, which)
    except store.Unreachable as error:
        kept = isinstance(which, int) and not store.absent(error.__cause__)
        memory = paths.memory / ("autoencoders" if setting == "vae.pretrained" else "initial")
        if kept and any(memory.glob(f"{name}-{which}-*")):
            return []
        return [f"{setting}: {spec} is not to be had ({store.one_line(error)})"]
    return []


def room(root: Path, asked: dict[str, int], stages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Faults and warnings where the disk of `root`, or of DVC's cache, has less free than the results of `stages` ask for
    (bytes)."""
    wanted, cache = sum(size for name, size in asked.items() if name in stages), cache_folder(root)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free, folder = min((shutil.disk_usage(folder).free, folder) for folder in (root, there))
    told = f"the results take about {wanted / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {folder.resolve()}"
    if wanted > free:
        return [f"{told}: free some, or work on another disk"], []
    if 2 * wanted > free:
        return [], [f"{told}: DVC's cache keeps a copy of each, unless it links (dvc config cache.type hardlink,copy)"]
    return [], []
