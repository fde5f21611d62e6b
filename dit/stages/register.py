"""register: the model with its figures goes to the registry, and becomes @champion if it is better than the champion.

It runs every time and changes nothing where nothing has changed: a version is found by the digest of what it holds. Its
tags say which steps are done (tested, decided, settled), so that what was killed goes on where it stopped.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit import entry, locks, packing, runtime, store, tracking
from dit.config import digest
from dit.contest import Candidate, Incomparable, beats, forbidden, read_candidate, rescore
from dit.evaluation import EvaluateConfig
from dit.paths import Paths, file_sha256, publish, write_json
from dit.provenance import provenance, settings
from dit.registry import Registry, Version
from dit.runtime import RunConfig
from dit.setting import SampleConfig, Setting

UPLOAD_SECONDS = 300  # for one request, which may carry the weights
OWN = "own"  # the licence tag of weights that descend from nobody else's
TESTED, RECORD, SETTLED, TERMS = "dit.tested", "dit.record", "dit.settled", "dit.terms"


@dataclass(frozen=True)
class RegisterConfig:
    """The registered model's name, and the figure that decides: `metric` (fid, fid_pooled, ...) of a sample setting.

    `allowed_licenses`: of other people's weights that a champion may descend from; null = any. With `promotion` manual
    a model that would become the champion stays a challenger until a person moves the alias.
    """

    model_name: str
    setting: str
    metric: str = "fid"
    allowed_licenses: tuple[str, ...] | None = None
    promotion: Literal["auto", "manual"] = "auto"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.model_name):
            raise ValueError(f"model_name must be letters, digits, dashes and dots, got {self.model_name!r}")


def register(
    register: RegisterConfig, sample: SampleConfig, evaluate: EvaluateConfig, run: RunConfig, *, paths: Paths
) -> None:
    """Write artifacts/register/model.json: name, version, alias, the decision and its reasons.

    Where MLflow does not answer it says `"registered": false` and why; the next run makes it good.
    """
    code = packing.shipped_files()
    candidate = read_candidate(paths.artifacts, code, register.setting, register.metric, sample, evaluate)
    key = digest(candidate.digest, candidate.terms, register, store.tracking_uri(paths))
    told = _remembered(paths, _memory(paths, register), key)
    if told is None:

        def score_champion(champion: Version) -> tuple[float, Setting]:
            return _score_champion(registry, champion, candidate, sample, evaluate, run, paths)

        try:
            with store.translated():
                client = tracking.connect(paths, timeout_seconds=UPLOAD_SECONDS)
                registry = Registry(client, register.model_name, _workspace(paths))
                with locks.held(_memory(paths, register).with_suffix(".lock"), _waiting):
                    version = registry.find(candidate.digest) or _add(registry, candidate, sample, run, paths)
                    told = _settle(registry, version, candidate, register, score_champion, paths)
        except store.Unreachable as error:
            store.say_unreachable(paths, error)
            told = _offline(register.model_name, candidate, error)
        if told["decision"] in ("champion", "challenger"):
            write_json(_memory(paths, register), {"key": key, "store": store.store_stamp(paths), "told": told})
    with publish(paths.artifacts / "register", paths.scratch) as folder:
        write_json(folder / "model.json", told)
    what = f"version {told['version']}, {told['decision']}" if told["registered"] else "not registered"
    print(f"{told['name']}: {what}. {' '.join(told['reasons'])}")


def _waiting(line: str) -> None:
    print(f"register: {line}: it decides on another version of this model")


def _settle(
    registry: Registry,
    version: Version,
    candidate: Candidate,
    register: RegisterConfig,
    score_champion: Callable[[Version], tuple[float, Setting]],
    paths: Paths,
) -> dict[str, Any]:
    """Test, decide, move the alias: what of it is not done yet. Returns the content of model.json.

    A candidate whose licence is not allowed is no champion, whatever its figure, and ceases to be where it was; a
    champion whose licence is not counts as none. Where a person promotes, what would be champion is a challenger.
    """
    if TESTED not in version.tags:
        packing.try_out(f"models:/{registry.name}/{version.number}", store.tracking_uri(paths))
        registry.tag(version, {TESTED: "true"})
    record = json.loads(version.tags.get(RECORD, "{}"))
    allowed = register.allowed_licenses
    asked = digest(
        candidate.terms,
        *([] if allowed is None else [sorted(allowed)]),
        *([] if register.promotion == "auto" else [register.promotion]),
    )
    if record.get("terms") != asked:
        registry.tag(version, {candidate.score_tag: repr(candidate.value), TERMS: json.dumps(candidate.terms)})
        record = {"terms": asked, **_decide(registry, version, candidate, allowed, score_champion)}
        if register.promotion == "manual" and record["decision"] == "champion" != _alias(registry, version):
            record |= {"alias": "challenger", "decision": "challenger"}
            record["reasons"] = [*record["reasons"], _by_hand(registry.name, version)]
        if record["decision"] != "undecided":
            registry.tag(version, {RECORD: json.dumps(record)})
    if version.tags.get(SETTLED) != digest(record):  # else the aliases are as decided, or as a person moved them since
        before = registry.aliases()
        registry.set_alias(record["alias"], version)
        other = "challenger" if record["alias"] == "champion" else "champion"
        if before.get(other) == version.number:
            registry.drop_alias(other)
        registry.tag(version, {SETTLED: digest(record)})
    return _tell(registry, version, candidate, record)


def _decide(
    registry: Registry,
    version: Version,
    candidate: Candidate,
    allowed: Sequence[str] | None,
    score_champion: Callable[[Version], tuple[float, Setting]],
) -> dict[str, Any]:
    """The alias, the decision and its reasons; the champion that it was compared with, and the champion's figure."""
    number = registry.aliases().get("champion")
    rival = f"Champion version {number}"

    def told(decision: str, *reasons: str, value: float = math.nan) -> dict[str, Any]:
        alias = "champion" if decision == "champion" else "challenger"
        told = {"alias": alias, "decision": decision, "reasons": list(reasons)}
        return told | {"champion_version": number, "champion_value": _finite(value)}

    if fault := forbidden(candidate.config.get("license"), allowed):
        return told("challenger", f"Its weights are {fault}.")
    if number == version.number:
        return told("champion", "It is the champion already.")
    if not math.isfinite(candidate.value):
        return told("challenger", f"Its {candidate.metric} is {candidate.value}, which never wins.")
    if number is None:
        return told("champion", "There was no champion.")
    champion, reasons = registry.get(number), []
    license = champion.tags.get("license", OWN)
    if fault := forbidden(None if license == OWN else license, allowed):
        return told("champion", f"{rival} counts as none: its weights are {fault}.")
    if candidate.score_tag in champion.tags:
        value = float(champion.tags[candidate.score_tag])
    else:
        try:
            value, setting = score_champion(champion)
        except Incomparable as error:
            return told("challenger", f"{rival} is not comparable: {error}. Move the alias by hand.")
        except store.Unreachable as error:
            return told(
                "undecided",
                f"{rival} could not be fetched: {error}. The next run tries again; if it is gone for good, move the alias by hand.",
            )
        registry.tag(champion, {candidate.score_tag: repr(value)})
        reasons.append(f"{rival} had been scored on other terms, so it drew again and was scored again.")
        if setting != candidate.setting:
            theirs, ours = setting.sampler, candidate.setting.sampler
            reasons.append(f"It drew with {theirs}, since {ours} does not fit its objective.")
    wins = beats(candidate.metric, candidate.value, value)
    verb = "beats" if wins else "equals" if candidate.value == value else "does not beat"
    reasons.append(f"{candidate.metric} {candidate.value:.6g} {verb} champion version {number}'s {value:.6g}.")
    return told("champion" if wins else "challenger", *reasons, value=value)


def _score_champion(
    registry: Registry,
    champion: Version,
    candidate: Candidate,
    sample: SampleConfig,
    evaluate: EvaluateConfig,
    run: RunConfig,
    paths: Paths,
) -> tuple[float, Setting]:
    place = _workspace(paths) / "champion"
    shutil.rmtree(place, ignore_errors=True)
    try:
        with store.translated():
            files = registry.fetch(champion, place) / "artifacts"
        if not (files / "ema").is_dir():
            raise store.Unreachable("its weights are not among its files")
        own = json.loads(champion.tags[TERMS])["setting"] if TERMS in champion.tags else None
        reference, device = paths.artifacts / "reference", runtime.start(run)
        setting = Setting("own", **own) if own else None
        return rescore(files / "ema", files / "vae", setting, candidate, sample, evaluate, reference, device)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _add(registry: Registry, candidate: Candidate, sample: SampleConfig, run: RunConfig, paths: Paths) -> Version:
    def pack(folder: Path, entry: dict[str, Any]) -> None:
        first = [candidate.setting, *(s for s in sample.settings if s != candidate.setting)]
        parts = {name: (paths.artifacts / name).resolve() for name in ("ema", "vae")}
        packing.pack(folder, **parts, settings=first, seed=sample.seed, block_images=sample.block_images, entry=entry)

    with tracking.continue_run(paths, experiment=run.experiment, timeout_seconds=UPLOAD_SECONDS) as mirror:
        if mirror.id is None:
            raise store.Unreachable("the run could not be continued")
        tags = {name: str(candidate.terms[name]) for name in ("extractor", "reference", "num_images", "metric")}
        tags |= {"value": repr(candidate.value), "setting": candidate.setting.name, "run_id": mirror.id}
        tags |= {"model_digest": file_sha256(paths.artifacts / "ema" / "model.safetensors")}
        license = candidate.config.get("license") or OWN
        tags |= {"license": license, "params_digest": digest(settings(paths))}
        tags |= {name: value for name, value in provenance(paths).items() if name.startswith("git.")}
        version = registry.add(candidate.digest, mirror.id, tags, pack)
        mirror.tags({"dit.registered": f"{registry.name}/{version.number}", "license": license})
    return version


def _tell(registry: Registry, version: Version, candidate: Candidate, record: dict[str, Any]) -> dict[str, Any]:
    aliases, reasons = registry.aliases(), list(record["reasons"])
    alias = _alias(registry, version)
    if alias != record["alias"]:
        now = aliases.get(record["alias"])
        reasons.append(f"Since then @{record['alias']} has moved to {f'version {now}' if now else 'no version'}.")
    told = {"name": registry.name, "registered": True, "version": version.number, "alias": alias}
    told |= {"decision": record["decision"], "reasons": reasons, **_figure(candidate)}
    told |= {name: record[name] for name in ("champion_version", "champion_value")}
    return told | {"run_id": version.run_id}


def _alias(registry: Registry, version: Version) -> str | None:
    aliases = registry.aliases()
    return next((name for name in ("champion", "challenger") if aliases.get(name) == version.number), None)


def _by_hand(name: str, version: Version) -> str:
    move = f"MlflowClient().set_registered_model_alias({name!r}, 'champion', '{version.number}')"
    return f"register.promotion is manual: to make it the champion move the alias, on MLflow's page or by {move}."


def _offline(name: str, candidate: Candidate, error: store.Unreachable) -> dict[str, Any]:
    told = {"name": name, "registered": False, "version": None, "alias": None, "decision": "offline"}
    told |= {"reasons": [f"MLflow could not be used ({error}). The next run makes it good."], **_figure(candidate)}
    return told | {"champion_version": None, "champion_value": None, "run_id": None}


def _figure(candidate: Candidate) -> dict[str, Any]:
    told = {"metric": candidate.metric, "value": _finite(candidate.value)}
    return told | {"setting": candidate.setting.name, "digest": candidate.digest}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _remembered(paths: Paths, file: Path, key: str) -> dict[str, Any] | None:
    # A local database that was not written to since says what it said then: no need to ask.
    try:
        last = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    same = last["key"] == key and last["store"] is not None and last["store"] == store.store_stamp(paths)
    return last["told"] if same else None


def _memory(paths: Paths, register: RegisterConfig) -> Path:
    """What MLflow said last of this model: the file is the home's, whose database it is."""
    return paths.memory / "register" / f"{register.model_name}.json"


def _workspace(paths: Paths) -> Path:
    folder = paths.scratch / "register"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    entry.main(register)
