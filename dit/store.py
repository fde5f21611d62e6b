"""Where MLflow's store is, and whether it answers.

MLflow itself is not imported here: a "no" costs milliseconds, and so does "nothing has changed since".
"""

import contextlib
import os
import re
import socket
import sqlite3
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dit import locks
from dit.paths import Paths, write_atomic

PROBE_SECONDS = 3.0  # for the first sign of life of a server or a database
SILENT_SECONDS = 900.0  # in which the stages of one pipeline do not repeat what one of them has said


class Unreachable(Exception):
    """MLflow cannot be used. The message says why, in one line."""


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn what MLflow and its libraries raise into `Unreachable`; other errors are the program's own."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("mlflow", "requests", "urllib3", "sqlalchemy"):
            raise
        raise Unreachable(one_line(error)) from error


def absent(error: Exception) -> bool:
    """Whether an error of MLflow's says that it answers, and does not know what it was asked for."""
    return getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


def tracking_uri(paths: Paths) -> str:
    """MLFLOW_TRACKING_URI, or else a database; it, or one that is named relatively, lies in the checkout's home."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    scheme, _, path = uri.partition(":///")
    if scheme == "sqlite" and path and not path.startswith("/"):
        return f"sqlite:///{(paths.home / path).resolve()}"
    return uri


def require(uri: str, paths: Paths, migrate: Callable[[Path], None]) -> None:
    """Raise within seconds unless the store at `uri` answers. A fresh SQLite database is set up by `migrate` first."""
    database = database_file(uri)
    if database is None:
        return _probe(uri)
    if _empty(database):
        with locks.held(paths.memory / "lock" / "mlflow"):
            if _empty(database):
                _make(database, migrate)
    with contextlib.closing(sqlite3.connect(database, timeout=PROBE_SECONDS)) as connection:
        connection.execute("BEGIN IMMEDIATE")  # fails where the file is torn, read-only, or held by another
        connection.rollback()


def database_file(uri: str) -> Path | None:
    """The file of a `sqlite:///` address, else None."""
    scheme, _, path = uri.partition(":///")
    return Path(unquote(path.split("?")[0])).resolve() if scheme == "sqlite" and path else None


def store_stamp(paths: Paths) -> list[int] | None:
    """A local database's state as the file system sees it: equal means nothing was written. Else None."""
    database = database_file(tracking_uri(paths))
    if database is None or not database.is_file():
        return None
    stats = [file.stat() for file in (database, database.with_name(f"{database.name}-wal")) if file.is_file()]
    return [number for s in stats for number in (s.st_ino, s.st_size, s.st_mtime_ns)]


def say_unreachable(paths: Paths, reason: object) -> None:
    """Print that MLflow is not there: once in a pipeline, though each stage is a process of its own."""
    line = f"mlflow: {without_password(tracking_uri(paths))} cannot be used ({one_line(reason)}): going on without it"
    said = paths.scratch / "mlflow-unreachable"
    if said.is_file() and said.read_text() == line and time.time() - said.stat().st_mtime < SILENT_SECONDS:
        return
    write_atomic(said, line.encode())
    print(line, flush=True)


def without_password(uri: str) -> str:
    """The address as it may be shown and stored. A password may hold anything but blanks, slashes and @ included."""
    return re.sub(r"(?<=://)([^/\s]*:\S*|[^/?#\s]*)@", "", uri)


def one_line(reason: object) -> str:
    """An error as a person reads it: its first 200 characters, on one line, without passwords."""
    text = without_password(" ".join(str(reason).split())) or type(reason).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def _empty(database: Path) -> bool:
    return not database.is_file() or database.stat().st_size == 0


def _make(database: Path, migrate: Callable[[Path], None]) -> None:
    # MLflow cannot mend a database whose set-up was killed half-way. So it is made under another name: all or nothing.
    database.parent.mkdir(parents=True, exist_ok=True)
    fresh = database.with_name(f"{database.name}.new")
    fresh.unlink(missing_ok=True)
    migrate(fresh)
    write_atomic(database, fresh.read_bytes())  # a copy: this process still holds the other one open
    fresh.unlink()


def _probe(uri: str) -> None:
    """Raise unless there is a sign of life: an HTTP answer of whatever kind, or a port that opens."""
    address = urlsplit(uri)
    try:
        port = address.port or {"postgresql": 5432, "mysql": 3306, "mssql": 1433}.get(address.scheme.split("+")[0])
    except ValueError:  # its message quotes what stands there, which may be half a password
        raise Unreachable("its port is no number: write / ? # in a password as %2F %3F %23") from None
    if address.scheme in ("http", "https"):
        bare = address._replace(netloc=address.netloc.rpartition("@")[2], query="", fragment="").geturl()
        try:
            urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise Unreachable(f"it answers {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # MLflow has settings of its own for certificates
                raise Unreachable(str(error.reason)) from error
    elif address.hostname and port:
        socket.create_connection((address.hostname, port), PROBE_SECONDS).close()
