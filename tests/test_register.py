"""The registry's decisions, against a real database and real, tiny models."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_model import CLASSES, EXTRACTOR, write_metrics, write_model, write_reference, write_training

from dit import packing, store, tracking
from dit.checkpoint import load_checkpoint
from dit.evaluation import EvaluateConfig, score
from dit.generation import SampleConfig, Setting, generate_blocks
from dit.imagesets import from_array
from dit.paths import Paths
from dit.registry import DIGEST
from dit.runtime import RunConfig
from dit.stages.register import RECORD, TESTED, RegisterConfig, register
from dit.vae import Autoencoder

NAME = "dit-digits"
SAMPLE = SampleConfig(12, 0, "balanced", 8, (Setting("plain", 1.5, "euler", 2),))
EVALUATE, RUN = EvaluateConfig(is_splits=2), RunConfig(device="cpu")
METRIC = f"fid_{EXTRACTOR}_12"


class Killed(BaseException):
    """Stands for SIGKILL: nothing below catches it."""


@pytest.fixture(scope="module")
def fresh_database(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        home = Paths(tmp_path_factory.mktemp("database"))
        tracking.connect(home)
    return home.root / "mlflow.db"


@pytest.fixture
def paths(tmp_path, fresh_database, monkeypatch):
    """A checkout with a trained model whose FID is 2, and an empty registry."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    paths = Paths(tmp_path)
    shutil.copy(fresh_database, tmp_path / "mlflow.db")
    write_reference(paths.artifacts)
    write_training(paths)
    retrain(paths, seed=0, fid=2.0)
    return paths


@pytest.fixture(autouse=True)
def trials(monkeypatch):
    """Try versions out in this process: the same load and predict, without six seconds of imports. Lists them."""
    import mlflow

    tried = []

    def here(model_uri, tracking_uri):
        tried.append(model_uri)
        assert len(mlflow.pyfunc.load_model(model_uri).predict({"label": [0]})["image"][0]) > 50

    monkeypatch.setattr(packing, "try_out", here)
    return tried


def retrain(paths, seed, fid, reference="reference0", **model):
    write_model(paths.artifacts, seed, **model)
    write_metrics(paths.artifacts, fid, reference)


def run(paths, **settings):
    """Run the stage as DVC does, its output deleted first; returns model.json."""
    shutil.rmtree(paths.artifacts / "register", ignore_errors=True)
    config = RegisterConfig(**{"model_name": NAME, "setting": "plain"} | settings)
    register(config, SAMPLE, EVALUATE, RUN, paths=paths)
    return json.loads((paths.artifacts / "register" / "model.json").read_text())


def versions(paths, name=NAME):
    found = tracking.connect(paths).search_model_versions(f"name = '{name}'")
    return {int(version.version): version for version in found}


def aliases(paths, name=NAME):
    told = tracking.connect(paths).get_registered_model(name).aliases
    return {alias: int(number) for alias, number in told.items()}


def test_the_first_version_becomes_champion_and_draws_where_this_checkout_is_not_seen(paths, tmp_path_factory):
    told = run(paths)
    assert told["registered"] and told["version"] == 1 and told["alias"] == told["decision"] == "champion"
    assert told["metric"] == METRIC and told["value"] == 2.0 and told["reasons"] == ["There was no champion."]
    tags = versions(paths)[1].tags
    expected = {"metric": METRIC, "value": "2.0", "extractor": EXTRACTOR, "reference": "reference0", "num_images": "12"}
    assert tags.items() >= expected.items() and tags["setting"] == "plain" and tags["license"] == "CC0-1.0"
    assert tags["run_id"] == told["run_id"] == versions(paths)[1].run_id and tags[DIGEST] == told["digest"]
    run_of_it = tracking.connect(paths).get_run(told["run_id"])
    assert run_of_it.data.metrics[f"plain/{METRIC}"] == 2.0 and run_of_it.data.metrics["loss"] == 1 / 10

    code = f"import mlflow; row = mlflow.pyfunc.load_model('models:/{NAME}@champion').predict({{'label': ['two']}})"
    code += "; import dit.model; print(row['label'][0], len(row['image'][0]) > 50, dit.model.__file__)"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{paths.root}/mlflow.db"}
    environment.pop("PYTHONPATH", None)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120
    )
    label, drawn, file = done.stdout.split()
    assert label == "two" and drawn == "True" and str(paths.root / "mlartifacts") in file, done.stderr


def test_the_second_time_nothing_changes_and_it_is_quick(paths, trials, monkeypatch):
    run(paths)
    before, stamp = (paths.artifacts / "register" / "model.json").read_bytes(), store.store_stamp(paths)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "connect", pytest.fail)  # the database was not written to: it is not asked
        run(paths)
    next((paths.scratch / "register").glob("*.json")).unlink()
    run(paths)  # asked, it says the same
    assert (paths.artifacts / "register" / "model.json").read_bytes() == before
    assert store.store_stamp(paths) == stamp and list(versions(paths)) == [1] and len(trials) == 1


def test_the_stage_imports_no_mlflow_where_nothing_changed(paths):
    run(paths)
    code = f"""
import sys, json
from pathlib import Path
from dit.paths import Paths
from dit.generation import SampleConfig, Setting
from dit.evaluation import EvaluateConfig
from dit.runtime import RunConfig
from dit.stages.register import RegisterConfig, register
sample = SampleConfig(12, 0, "balanced", 8, (Setting("plain", 1.5, "euler", 2),))
config = RegisterConfig("{NAME}", "plain")
register(config, sample, EvaluateConfig(is_splits=2), RunConfig(device="cpu"), paths=Paths(Path(sys.argv[1])))
print([name for name in ("mlflow", "diffusers", "torch_fidelity") if name in sys.modules])
"""
    command = [sys.executable, "-c", code, str(paths.root)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_the_better_one_wins_the_others_are_challengers(paths):
    run(paths)
    retrain(paths, seed=1, fid=1.5)
    told = run(paths)
    assert told["alias"] == "champion" and told["champion_version"] == 1 and told["champion_value"] == 2.0
    assert told["reasons"] == [f"{METRIC} 1.5 beats champion version 1's 2."]
    for version, (fid, verb) in enumerate(((1.7, "does not beat"), (1.5, "equals"), (float("nan"), "never wins")), 3):
        retrain(paths, seed=version, fid=fid)
        told = run(paths)
        assert told["version"] == version and told["alias"] == told["decision"] == "challenger"
        assert verb in told["reasons"][0]
        assert aliases(paths) == {"champion": 2, "challenger": version}
    assert told["value"] is None


def test_where_a_person_promotes_the_better_one_stays_a_challenger_until_then(paths):
    told = run(paths, promotion="manual")
    assert (told["alias"], told["decision"], aliases(paths)) == ("challenger", "challenger", {"challenger": 1})
    assert told["reasons"][0] == "There was no champion."
    move = f"MlflowClient().set_registered_model_alias('{NAME}', 'champion', '1')"
    assert told["reasons"][1].startswith("register.promotion is manual: ") and move in told["reasons"][1]
    tracking.connect(paths).set_registered_model_alias(NAME, "champion", "1")
    tracking.connect(paths).delete_registered_model_alias(NAME, "challenger")
    assert run(paths, promotion="manual")["alias"] == "champion" and aliases(paths) == {"champion": 1}
    retrain(paths, seed=1, fid=1.5)
    told = run(paths, promotion="manual")
    assert told["decision"] == "challenger" and aliases(paths) == {"champion": 1, "challenger": 2}
    assert told["reasons"][0] == f"{METRIC} 1.5 beats champion version 1's 2."
    told = run(paths, promotion="auto")
    assert told["decision"] == "champion" and aliases(paths) == {"champion": 2}
    assert run(paths, promotion="manual")["reasons"] == ["It is the champion already."]
    assert aliases(paths) == {"champion": 2}


def test_mended_code_makes_a_new_version_of_the_same_weights(paths, tmp_path, monkeypatch):
    before = run(paths)
    package = shutil.copytree(packing.PACKAGE, tmp_path / "dit", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(packing, "PACKAGE", package)
    assert run(paths) == before  # the same code elsewhere
    (package / "stages" / "train.py").write_text("# nothing that predict needs\n")
    assert run(paths) == before
    mended = (package / "generation.py").read_text() + "# mended\n"
    (package / "generation.py").write_text(mended)
    told = run(paths)
    assert (told["version"], told["decision"], told["champion_version"]) == (2, "challenger", 1)
    assert told["reasons"] == [f"{METRIC} 2 equals champion version 1's 2."]
    shipped = [file.read_text() for file in (paths.root / "mlartifacts").rglob("code/dit/generation.py")]
    assert sorted(len(text) for text in shipped) == [len(mended) - len("# mended\n"), len(mended)]
    assert run(paths) == told


def test_a_large_upload_has_minutes_though_other_requests_have_seconds(paths, monkeypatch):
    allowed, pack = [], packing.pack

    def seen(*arguments, **named):
        allowed.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
        pack(*arguments, **named)

    monkeypatch.setattr(packing, "pack", seen)
    run(paths)
    assert allowed == ["300"]


def test_a_model_whose_figure_is_not_finite_is_no_champion_even_where_there_is_none(paths):
    retrain(paths, seed=1, fid=float("nan"))
    assert run(paths)["decision"] == "challenger" and "champion" not in aliases(paths)
    retrain(paths, seed=2, fid=50.0)
    assert run(paths)["decision"] == "champion"


def test_a_licence_that_is_not_allowed_keeps_a_model_from_becoming_champion(paths):
    told = run(paths, allowed_licenses=("Apache-2.0",))
    assert told["registered"] and told["decision"] == told["alias"] == "challenger"
    assert told["reasons"] == ["Its weights are under CC0-1.0, which is not among register.allowed_licenses."]
    assert aliases(paths) == {"challenger": 1} and versions(paths)[1].tags["license"] == "CC0-1.0"
    assert tracking.connect(paths).get_run(told["run_id"]).data.tags["license"] == "CC0-1.0"
    told = run(paths, allowed_licenses=("Apache-2.0", "cc0-1.0"))
    assert told["decision"] == "champion" and aliases(paths) == {"champion": 1}
    told = run(paths, allowed_licenses=())  # a rule that is made later holds for the champion too
    assert told["decision"] == "challenger" and aliases(paths) == {"challenger": 1}
    assert run(paths)["decision"] == "champion" and sorted(versions(paths)) == [1]


def test_a_champion_whose_licence_is_not_allowed_gives_way(paths):
    run(paths)
    retrain(paths, seed=1, fid=3.0)
    config = paths.artifacts / "ema" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"license": "MIT"}))
    assert run(paths)["decision"] == "challenger" and aliases(paths) == {"champion": 1, "challenger": 2}
    told = run(paths, allowed_licenses=("MIT",))  # a rule that is made later
    assert (
        told["version"] == 2 and told["decision"] == told["alias"] == "champion" and aliases(paths) == {"champion": 2}
    )
    assert told["reasons"] == [
        "Champion version 1 counts as none: its weights are under CC0-1.0, which is not among register.allowed_licenses."
    ]
    assert run(paths, allowed_licenses=("MIT",)) == told
    retrain(paths, seed=2, fid=float("nan"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"license": None}))
    assert run(paths, allowed_licenses=())["decision"] == "challenger", "what never wins is no champion by this either"
    retrain(paths, seed=3, fid=9.0)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"license": None}))
    told = run(paths, allowed_licenses=())
    assert told["decision"] == "champion" and "under MIT" in told["reasons"][0] and told["champion_version"] == 2


def test_where_the_reference_changed_the_champion_is_scored_on_the_new_one_first(paths, monkeypatch):
    run(paths)
    files = load_checkpoint(paths.artifacts / "ema"), Autoencoder.load(paths.artifacts / "vae")
    reference = write_reference(paths.artifacts, seed=1)
    expected = score(
        from_array(*generate_blocks(*files, SAMPLE.settings[0], SAMPLE)), paths.artifacts / "reference", EVALUATE
    )[METRIC]
    assert expected != 2.0

    retrain(paths, seed=1, fid=expected * 1.01, reference=reference)
    told = run(paths)
    assert told["decision"] == "challenger" and told["champion_value"] == pytest.approx(expected)
    assert "scored again" in told["reasons"][0]

    monkeypatch.setattr("dit.contest.score", lambda *_, **__: pytest.fail("the champion's new figure is known already"))
    retrain(paths, seed=2, fid=expected * 0.99, reference=reference)  # worse than the champion's old 2.0, or not
    told = run(paths)
    assert told["decision"] == "champion" and aliases(paths) == {"champion": 3, "challenger": 2}


def test_a_champion_of_another_objective_draws_with_its_own_sampler(paths):
    run(paths)
    write_reference(paths.artifacts, seed=1)
    retrain(paths, seed=1, fid=1e9, reference="reference1", objective="diffusion")
    config = RegisterConfig(NAME, "plain")
    sample = SampleConfig(12, 0, "balanced", 8, (Setting("plain", 1.5, "ddim", 2),))
    register(config, sample, EVALUATE, RUN, paths=paths)
    told = json.loads((paths.artifacts / "register" / "model.json").read_text())
    assert told["decision"] == "challenger" and "It drew with euler, since ddim does not fit" in told["reasons"][1]


def test_models_of_other_classes_are_not_compared(paths):
    run(paths)
    write_reference(paths.artifacts, seed=1)
    retrain(paths, seed=1, fid=0.1, reference="reference1", classes=[*CLASSES, "three"])
    told = run(paths)
    assert told["decision"] == "challenger" and "not comparable: its classes are" in told["reasons"][0]
    assert aliases(paths) == {"champion": 1, "challenger": 2}


def test_a_champion_that_cannot_be_fetched_is_asked_for_again(paths):
    run(paths)
    files = next((paths.root / "mlartifacts" / "models").iterdir())
    files.rename(paths.root / "away")
    reference = write_reference(paths.artifacts, seed=1)
    retrain(paths, seed=1, fid=1e9, reference=reference)
    told = run(paths)
    assert told["decision"] == "undecided" and told["alias"] == "challenger" and told["registered"]
    (paths.root / "away").rename(files)
    told = run(paths)
    assert told["decision"] == "challenger" and told["champion_value"] < 1e9 and list(versions(paths)) == [2, 1]


def test_offline_it_says_so_and_the_next_run_makes_it_good(paths, monkeypatch, capsys):
    with monkeypatch.context() as offline:
        offline.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        started = time.monotonic()
        told = run(paths)
        assert time.monotonic() - started < 20  # MLflow itself would try for minutes
    assert told["registered"] is False and told["version"] is None and "refused" in told["reasons"][0]
    assert "going on without it" in capsys.readouterr().out
    told = run(paths)
    assert told["registered"] is True and told["version"] == 1 and told["alias"] == "champion"


def test_killed_anywhere_the_next_run_completes_it(paths, monkeypatch, trials):
    """Killed before the first call that changes something at MLflow, then before the second, and so on to the last."""
    import mlflow

    run(paths)  # the champion, so that the others are decided against it
    calls, last = 0, 0

    def counted(original):
        def method(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == last:
                raise Killed
            return original(*arguments, **named)

        return method

    changing = ["create_logged_model", "log_model_artifacts", "finalize_logged_model", "create_model_version"]
    for name in [*changing, "set_model_version_tag", "set_registered_model_alias"]:
        monkeypatch.setattr(mlflow.MlflowClient, name, counted(getattr(mlflow.MlflowClient, name)))
    version, finished = 1, False
    while not finished:
        version, calls, last = version + 1, 0, last + 1
        retrain(paths, seed=version, fid=3.0)
        try:
            run(paths)
            finished = True
        except Killed:
            assert not (paths.artifacts / "register").exists()
            if aliases(paths).get("challenger") == version:
                assert {TESTED, RECORD} <= set(versions(paths)[version].tags)
            told = run(paths)
            assert (told["version"], told["decision"], told["alias"]) == (version, "challenger", "challenger")
            assert told["reasons"] == [f"{METRIC} 3 does not beat champion version 1's 2."]
        assert sorted(versions(paths)) == list(range(1, version + 1))
        assert aliases(paths) == {"champion": 1, "challenger": version}
    assert last > 9 and len(trials) >= version


def test_an_alias_that_a_person_moved_is_left_where_it_is(paths):
    run(paths)
    retrain(paths, seed=1, fid=1.0)
    run(paths)
    tracking.connect(paths).set_registered_model_alias(NAME, "champion", "1")
    told = run(paths)
    assert aliases(paths)["champion"] == 1 and told["alias"] is None and told["decision"] == "champion"
    assert told["reasons"][-1] == "Since then @champion has moved to version 1."


def test_a_version_that_cannot_draw_never_gets_an_alias(paths):
    run(paths)
    retrain(paths, seed=1, fid=0.1)
    weights = paths.artifacts / "ema" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for _ in range(2):
        with pytest.raises(ValueError, match="missing or torn"):
            run(paths)
    assert aliases(paths) == {"champion": 1} and sorted(versions(paths)) == [1, 2]
    assert not (paths.artifacts / "register").exists()


def test_another_deciding_figure_is_decided_on_anew(paths):
    run(paths)
    retrain(paths, seed=1, fid=3.0)
    assert run(paths)["decision"] == "challenger"
    told = run(paths, metric="class_agreement")
    assert told["version"] == 2 and told["metric"] == "class_agreement_12" and told["champion_value"] != 2.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"setting": "cfg9"}, "register.setting: 'cfg9' is none of sample.settings: use plain"),
        (
            {"metric": "fad"},
            "register.metric: 'fad' is not among the metrics: use one of fid, fid_pooled, class_agreement",
        ),
        ({"model_name": "a/b"}, "model_name must be letters"),
    ],
)
def test_what_is_not_there_is_said(paths, settings, said):
    with pytest.raises(ValueError) as caught:
        run(paths, **settings)
    assert said in str(caught.value) and not (paths.artifacts / "register").exists()
