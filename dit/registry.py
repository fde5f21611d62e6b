"""The registry of models at MLflow: numbered versions found by the digest of what they hold, and their aliases."""

import glob
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit import locks, store, tracking
from dit.config import digest
from dit.paths import Paths, publish

DIGEST = "dit.digest"  # the tag that a version is found by: it is there from the moment the version is
REGISTRY_URI = "MLFLOW_REGISTRY_URI"  # where the registry is, if elsewhere than the runs
FETCH_SECONDS = 300  # for one request, which may carry the weights


@dataclass(frozen=True)
class Version:
    """A registered version and its tags."""

    number: int
    tags: dict[str, str]
    run_id: str | None


class Registry:
    """The versions of the model `name`, through an `MlflowClient`; `workspace` has room for a model."""

    def __init__(self, client: Any, name: str, workspace: Path):
        self._client, self.name, self._workspace = client, name, workspace
        workspace.mkdir(parents=True, exist_ok=True)

    def find(self, digest: str) -> Version | None:
        """The version of this content; of several (two machines at once) the first."""
        found = self._client.search_model_versions(f"name = '{self.name}' and tags.`{DIGEST}` = '{digest}'")
        return min(map(_version, found), key=lambda version: version.number, default=None)

    def aliases(self) -> dict[str, int]:
        """{"champion": 3}. Asked of the model: what a search returns carries no aliases."""
        try:
            return {
                alias: int(number) for alias, number in self._client.get_registered_model(self.name).aliases.items()
            }
        except Exception as error:
            if not store.absent(error):
                raise
            return {}

    def get(self, number: int) -> Version:
        """A version by its number."""
        return _version(self._client.get_model_version(self.name, str(number)))

    def add(
        self, digest: str, run_id: str, tags: dict[str, str], pack: Callable[[Path, dict[str, Any]], None]
    ) -> Version:
        """A new version, of the folder that `pack(folder, entry)` writes; `entry` says what it is in MLflow.

        Killed at any point and called again, it ends with one version: the files first, then the version with its
        digest in a single step.
        """
        if not self._exists():
            self._client.create_registered_model(self.name)
        model = self._model(digest, run_id)
        if str(model.status) != "READY":
            folder = self._workspace / "packed"
            shutil.rmtree(folder, ignore_errors=True)
            entry = {"artifact_path": model.artifact_location, "model_uuid": model.model_id}
            pack(folder, {**entry, "model_id": model.model_id, "run_id": run_id})
            self._client.log_model_artifacts(model.model_id, str(folder))
            shutil.rmtree(folder)
            self._client.finalize_logged_model(model.model_id, "READY")
        told = {**tags, DIGEST: digest}
        made = self._client.create_model_version(
            self.name, f"models:/{model.model_id}", run_id, told, model_id=model.model_id
        )
        return _version(made)

    def fetch(self, version: Version, folder: Path) -> Path:
        """Fetch a version's files into an empty folder; returns where MLflow put them."""
        from mlflow.artifacts import download_artifacts

        folder.mkdir(parents=True, exist_ok=True)
        address = f"models:/{self.name}/{version.number}"
        return Path(download_artifacts(artifact_uri=address, dst_path=str(folder)))

    def tag(self, version: Version, tags: dict[str, object]) -> None:
        """Set tags of a version."""
        for key, value in tags.items():
            self._client.set_model_version_tag(self.name, str(version.number), key, str(value))

    def set_alias(self, alias: str, version: Version) -> None:
        """Move an alias to a version: one step at MLflow."""
        self._client.set_registered_model_alias(self.name, alias, str(version.number))

    def drop_alias(self, alias: str) -> None:
        """Take an alias away from whatever has it."""
        self._client.delete_registered_model_alias(self.name, alias)

    def _exists(self) -> bool:
        try:
            return bool(self._client.get_registered_model(self.name))
        except Exception as error:
            if not store.absent(error):
                raise
            return False

    def _model(self, digest: str, run_id: str) -> Any:
        # MLflow keeps a model's files under an entry of their own; one that a killed attempt left is used.
        experiment = self._client.get_run(run_id).info.experiment_id
        where = f"source_run_id = '{run_id}' and tags.`{DIGEST}` = '{digest}'"
        left = self._client.search_logged_models([experiment], filter_string=where)
        if left:
            return left[0]
        return self._client.create_logged_model(experiment, self.name, run_id, {DIGEST: digest}, model_type="diffusion")


KEPT = {"ema": "initial", "vae": "autoencoders"}  # a version's parts, and where memory keeps those that were fetched


def download(paths: Paths, name: str, which: str | int, part: str = "ema") -> Path:
    """The checkpoint folder (or its autoencoder's: `part` vae) of a registered model, by its alias or its number.

    A version that is there already is not fetched again, and a number then does without a server that does not answer.
    It counts as the same where the server's address, the name, the number and what the version holds are. Raises
    ValueError where the server cannot be reached or does not know it.
    """
    place = f"models:/{name}" + (f"/{which}" if isinstance(which, int) else f"@{which}")
    kept, address = paths.memory / KEPT[part], digest(store.tracking_uri(paths), os.environ.get(REGISTRY_URI))[:8]
    try:
        with store.translated():
            client = tracking.connect(paths, timeout_seconds=FETCH_SECONDS)
            version = (
                client.get_model_version(name, str(which))
                if isinstance(which, int)
                else client.get_model_version_by_alias(name, which)
            )
            content = version.tags.get(DIGEST) or [version.run_id, version.source, version.creation_timestamp]
            folder = kept / f"{name}-{version.version}-{address}-{digest(content)[:8]}"
            with locks.held(paths.memory / "lock" / f"{KEPT[part]}-{folder.name}"):
                if not folder.is_dir():
                    _fetch_part(f"models:/{name}/{version.version}", f"artifacts/{part}", folder, paths.memory)
        return folder
    except store.Unreachable as error:
        there = [] if store.absent(error.__cause__) else sorted(kept.glob(f"{glob.escape(name)}-{which}-{address}-*"))
        if isinstance(which, int) and there:
            return max(there, key=lambda folder: folder.stat().st_mtime)
        raise ValueError(f"{place} could not be fetched ({store.one_line(error)})") from None


def _fetch_part(address: str, part: str, folder: Path, scratch: Path) -> None:
    from mlflow.artifacts import download_artifacts

    with publish(folder, scratch) as unfinished, tempfile.TemporaryDirectory(dir=scratch) as there:
        got = Path(download_artifacts(artifact_uri=f"{address}/{part}", dst_path=there))
        for file in got.iterdir():
            file.rename(unfinished / file.name)


def _version(told: Any) -> Version:
    return Version(int(told.version), dict(told.tags), told.run_id)
