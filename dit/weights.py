"""Where the weights of published feature extractors lie, and how they come there: no byte is believed unchecked.

Inception's file is looked for where torch-fidelity looks for it too, and brought from its release where it is missing
and there is a network. The other extractors' files must be there already: see `dit/embeddings.py`.
"""

import os
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

from dit.paths import file_sha256, replacing

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d"  # its first digits, which the name tells too
TIMEOUT_SECONDS, PROBE_SECONDS = 30, 5
INCEPTION = ("inception", "inception-v3-compat")  # the extractor's names: ours, and torch-fidelity's
OWN = ("classifier", "random")  # extractors that need no published file


def checkpoints() -> Path:
    """Where torch keeps files that it has brought: $TORCH_HOME/hub/checkpoints, by default below ~/.cache/torch."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


def weights_file(name: str) -> Path | None:
    """The file that the extractor of this name opens, there or not; None for one that needs none.

    Raises ValueError for a name that nobody has.
    """
    if name in OWN:
        return None
    if name in INCEPTION:
        return checkpoints() / INCEPTION_FILE
    files = _library(name)
    return files[0][0] if files else None


def library_weights(name: str) -> list[Path]:
    """The files that torch-fidelity's extractor of this name opens, each there and what its address says it is.

    Raises ValueError, one line, with the first that is not: it says which file, from where and to where.
    """
    files = _library(name)
    for file, url in files:
        _require_there(name, file, url)
        told = re.search(r"-([0-9a-f]{8,64})\.pth$|/([0-9a-f]{64})/[^/]+$", url)  # the content's sha256, or its begin
        if told and not file_sha256(file).startswith(told[1] or told[2]):
            raise ValueError(f"reference.extractor: {file} is torn or another file: bring it from {url} again")
    return [file for file, _ in files]


def require_weights(name: str, given: Path | None = None, *, probe: bool = True) -> None:
    """Raise ValueError, one line, where the extractor of this name is not to be had, before any work: nothing is brought,
    and of files no more is looked at than whether they are there. With `probe`, an address is tried."""
    if name in OWN:
        return
    if name not in INCEPTION:
        for file, url in _library(name):
            _require_there(name, file, url)
    elif given:
        _require_given(Path(given).expanduser())
    elif probe and not (checkpoints() / INCEPTION_FILE).is_file():
        try:
            urllib.request.urlopen(urllib.request.Request(INCEPTION_URL, method="HEAD"), timeout=PROBE_SECONDS).close()
        except OSError as error:
            raise _out_of_reach(INCEPTION_URL, checkpoints() / INCEPTION_FILE, error) from None


def _require_there(name: str, file: Path, url: str) -> None:
    if not file.is_file():
        raise ValueError(f"reference.extractor (--extractor): {name} needs the file {file}: bring it from {url}")


def _require_given(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"reference.weights (--weights): {file} is not there: bring it from {INCEPTION_URL}")


def _library(name: str) -> list[tuple[Path, str]]:
    from dit.embeddings import library_weights

    try:
        return library_weights(name)
    except ValueError as error:
        known = str(error).rpartition("one of ")[2]
        raise ValueError(
            f"reference.extractor (--extractor): there is no extractor {name!r}: use inception, {', '.join(OWN)} or one of {known}"
        ) from None


def inception_weights(given: Path | None = None, say: Callable[[str], None] = print) -> tuple[Path, str]:
    """Inception's file and its sha256: the one that is `given`, the one in torch's folder, or brought to it now.

    Raises ValueError, one line that says which file, from where and to where, if there is none or it is another one.
    A file that is given may be any that fits the network: whoever asks for the papers' network compares the sha256.
    """
    path = Path(given).expanduser() if given else checkpoints() / INCEPTION_FILE
    if given:
        _require_given(path)
    if not path.is_file():
        say(f"bringing {INCEPTION_URL} to {path}")
        _bring(INCEPTION_URL, path)
    sha256 = file_sha256(path)
    if not given and not is_official(sha256):
        raise ValueError(f"{path} is torn or another file (its sha256 {sha256[:8]}...): bring it from {INCEPTION_URL}")
    return path, sha256


def is_official(sha256: str) -> bool:
    """Whether a file of this sha256 is the network that published figures are made with."""
    return sha256.startswith(INCEPTION_SHA256)


def _bring(url: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer,
            replacing(path) as unfinished,
            open(unfinished, "wb") as file,
        ):
            while block := answer.read(1 << 20):
                file.write(block)
            file.flush()
            if not is_official(sha256 := file_sha256(unfinished)):
                raise ValueError(f"{url} gave another file (its sha256 {sha256[:8]}...) than {path} must be: try again")
    except OSError as error:
        raise _out_of_reach(url, path, error) from None


def _out_of_reach(url: str, path: Path, error: OSError) -> ValueError:
    reason = getattr(error, "reason", None) or error
    return ValueError(
        f"Inception's weights {path} are missing and {url} cannot be reached ({reason}): "
        "bring the file from there, or name it by reference.weights (--weights)"
    )
