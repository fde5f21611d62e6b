import json
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit.check import check, check_in_dvc
from dit.checkpoint import network_config, save_checkpoint
from dit.config import check_sections, digest, load, parse, read_params
from dit.model import DiT, ModelConfig
from dit.paths import Paths


@dataclass(frozen=True)
class Inner:
    name: str
    steps: int


@dataclass(frozen=True)
class Nested:
    kind: str = "a"
    count: int = 1

    def __post_init__(self):
        if not self.kind:
            raise ValueError("kind must not be empty")


@dataclass(frozen=True)
class TrainSection:
    lr: float
    max_steps: int
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    inner: tuple[Inner, ...] = ()
    maybe: int | None = None
    flag: bool = False
    nested: Nested = Nested()

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


def stage(train: TrainSection, *, paths: Paths) -> None:
    """Only its signature counts."""


def test_reads_yaml_as_dvc_does(tmp_path):
    (tmp_path / "params.yaml").write_text(
        "train: {lr: 1e-4, max_steps: 3, sizes: [1, 2], inner: [{name: x, steps: 1}]}\n"
    )
    section = load(stage, tmp_path / "params.yaml")["train"]
    assert section == TrainSection(1e-4, 3, sizes=(1, 2), inner=(Inner("x", 1),))
    (tmp_path / "params.yaml").write_text("train: {lr: 1, max_steps: 3, nested: {count: 2}}\n")
    assert load(stage, tmp_path / "params.yaml")["train"].nested == Nested("a", 2)


@pytest.mark.parametrize(
    "values,message",
    [
        ({"lr": 1, "max_steps": 1, "max_step": 2}, "train.max_step: no such setting (did you mean train.max_steps?)"),
        ({"lr": "fast", "max_steps": 1}, "train.lr: input should be a valid number, got 'fast'"),
        ({"lr": 1, "max_steps": 1.5}, "train.max_steps: input should be a valid integer, got 1.5"),
        ({"lr": 1, "max_steps": "3"}, "train.max_steps: input should be a valid integer, got '3'"),
        ({"lr": 1, "max_steps": True}, "train.max_steps: input should be a valid integer, got True"),
        ({"lr": 1}, "train.max_steps: setting missing"),
        ({"lr": -1, "max_steps": 1}, "train.lr must be above 0, got -1.0"),
        ({"lr": 1, "max_steps": 1, "kind": "c"}, "train.kind: input should be 'a' or 'b', got 'c'"),
        (
            {"lr": 1, "max_steps": 1, "inner": [{"name": "x", "steps": 1, "stepz": 2}]},
            "train.inner.0.stepz: no such setting (did you mean train.inner.0.steps?)",
        ),
        (
            {"lr": 1, "max_steps": 1, "nested": {"kinf": "a"}},
            "train.nested.kinf: no such setting (did you mean train.nested.kind?)",
        ),
        ({"lr": 1, "max_steps": 1, "nested": {"kind": 3}}, "train.nested.kind: input should be a valid string, got 3"),
        ({"lr": 1, "max_steps": 1, "nested": {"kind": ""}}, "train.nested.kind must not be empty"),
        ({"lr": 1, "max_steps": 1, "nested": 3}, "train.nested: expected settings below it, got 3"),
        ("text", "train: expected settings below it in params.yaml, found 'text'"),
        (None, "train: section missing from params.yaml"),
    ],
)
def test_a_bad_value_is_one_line_with_its_path(values, message):
    with pytest.raises(ValueError) as caught:
        parse("train", values, TrainSection)
    assert str(caught.value) == message


def test_odd_sections_and_a_folder_are_told_too(tmp_path):
    with pytest.raises(ValueError, match="1: no such section in params.yaml"):
        check_sections([stage], {1: 2, "train": {"lr": 1, "max_steps": 1}})
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_params(tmp_path)
    with pytest.raises(ValueError, match="train.lr: "):
        parse("train", {"lr": float("nan"), "max_steps": 1}, TrainSection)


def test_all_faults_are_told_at_once_and_unknown_sections_too():
    with pytest.raises(ValueError) as caught:
        check_sections([stage], {"preset": "x", "trian": {}, "train": {"lr": 0, "max_steps": 1}})
    assert str(caught.value).splitlines() == [
        "trian: no such section in params.yaml (did you mean train?)",
        "train.lr must be above 0, got 0.0",
    ]


@pytest.mark.parametrize(
    "text,message", [("a: [1", "not readable YAML"), ("- 1", "must hold sections"), ("", "must hold sections")]
)
def test_a_broken_file_is_named(tmp_path, text, message):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_params(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is not there"):
        read_params(tmp_path / "other.yaml")


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.floats(allow_nan=False), max_size=5))
def test_a_digest_depends_on_content_and_not_on_order(settings):
    assert digest(settings) == digest(dict(reversed(settings.items())))
    assert digest(settings) != digest({**settings, "one more": 1})


@pytest.fixture
def project(tmp_path):
    import subprocess
    from pathlib import Path

    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "params.yaml").write_text((Path(__file__).parents[1] / "params.yaml").read_text())
    return tmp_path


def test_the_shipped_settings_fit_together(project):
    assert check(Paths(project))["train"].max_steps > 0


@pytest.mark.parametrize(
    "old,new,message",
    [
        (
            "patch_size: 4 ",
            "patch_size: 3 ",
            "model.patch_size: 3 does not divide the latent side 8 (image size 32 / 4)",
        ),
        ("image_size: 32", "image_size: 30", "data.image_size: 30 is no multiple of 4, the autoencoder's factor"),
        ("name: transport", "name: diffusion", "model.learn_sigma must be true for objective.name diffusion"),
        (
            "sampler: heun",
            "sampler: ddpm",
            "sampler 'ddpm' does not fit objective 'transport': use euler, heun, dopri5",
        ),
        ("setting: cfg1.5", "setting: cfg2", "register.setting: 'cfg2' is not one of sample.settings (plain, cfg1.5)"),
        (
            "held_out_fraction: 0.2",
            "held_out_fraction: 0",
            "data.held_out_fraction: 0 leaves nothing to judge the model by",
        ),
        ("condition: classes", "condition: embeddings", "model.condition: embeddings are those of encode.features"),
        ("features: null", "features: none.npz", "encode.features: the file none.npz is not there"),
        ("features: null", "features: pixels", "encode.features: 'pixels' is no file (.npz, .safetensors)"),
        ("metric: fid", "metric: zz", "register.metric: 'zz' is not among the metrics: use one of fid, fid_pooled"),
        ("sigma_rel: null", "sigma_rel: 0.1", "ema.sigma_rel: training keeps no power-function averages"),
        (
            "    weight: 0.0 ",
            "    weight: 0.5 ",
            "objective.alignment.weight: the latents carry no features to align with",
        ),
        ("condition: classes ", "condition: embeddings ", "model.condition: embeddings are those of encode.features"),
        ("max_steps: 2400 ", "max_steps: 0 ", "train.max_steps must be at least 1 (0 is for train.init_from), got 0"),
        ("step: null ", "step: 7 ", "ema.step: no average of step 7 is kept"),
        ("metric: fid", "metric: fad_x_1k", "register.metric: 'fad_x_1k' is not among the metrics"),
        ("init_from: null ", "init_from: models:/x ", "train.init_from: 'models:/x' is neither models:/NAME@ALIAS nor"),
        (
            "init_from: null ",
            "init_from: weights/x ",
            "'weights/x' is no folder with model.safetensors and config.json: name",
        ),
        ("mlp_ratio: 4.0", "mlp_ratio: 0.001", "model.mlp_ratio must leave the MLP a width of at least 1, got 0.001"),
        (
            "class_dropout_prob: 0.1",
            "class_dropout_prob: 0",
            "train.class_dropout_prob: 0 leaves the null label untrained",
        ),
        ("class_dropout_prob: 0.1", "class_dropout_prob: 1", "train.class_dropout_prob: 1 drops every condition"),
        ("max_shift_pixels: 2", "max_shift_pixels: 99", "reference.max_shift_pixels: must be below half"),
        ("kid_subset_size: 100", "kid_subset_size: 1", "evaluate.kid_subset_size must be at least 2, got 1"),
        ("bootstrap: 20", "bootstrap: 1", "evaluate.bootstrap must be 0 (none) or at least 2, got 1"),
        ("seed: 2020", "seed: -1", "evaluate.seed must be 0 to 4294967295, got -1"),
        ("processes: 0 ", "processes: 3 ", "run.processes: 3 do not divide train.global_batch_size 64"),
        ("latents: auto ", "latents: streamed ", "run.latents: streamed needs run.latents_from"),
        (
            "latents_from: null ",
            "latents_from: 's3://' ",
            "run.latents_from must be null, a folder or s3://bucket/prefix",
        ),
        ("shuffle_window: 0 ", "shuffle_window: -5 ", "train.shuffle_window must not be negative, got -5"),
        ("data_parts: 1 ", "data_parts: 65 ", "train.data_parts must be 1 to global_batch_size, got 65"),
        ("classes: natural ", "classes: {'1': -1} ", "train.classes must have weights of 0 or more"),
        ("classes: natural ", "classes: often ", "train.classes: input should be 'natural' or 'balanced'"),
        ("num_threads: 1 ", "num_threads: 1000000 ", "run.num_threads must be at most"),
        ("betas: [0.9, 0.999]", "betas: [1.5, 0.999]", "train.betas must be at least 0 and below 1"),
        ("weight_decay: 0.0 ", "weight_decay: .nan ", "train.weight_decay: "),
        ("num_images: 1000", "num_images: 3", "sample.num_images: 3 is too few for evaluate.nearest_k 3"),
        ("labels: folder          #", "labels: none #", "data.num_classes must be 0 where labels is none, got 10"),
    ],
)
def test_what_cannot_go_together_is_refused_before_any_work(project, old, new, message):
    text = (project / "params.yaml").read_text()
    assert old in text
    (project / "params.yaml").write_text(text.replace(old, new))
    with pytest.raises(ValueError) as caught:
        check(Paths(project))
    assert message in str(caught.value)


def test_the_shape_of_a_features_file_is_looked_at_before_any_work(project):
    import numpy as np

    text = (project / "params.yaml").read_text()
    aligned = text.replace("    weight: 0.0 ", "    weight: 0.5 ").replace(
        "features: null", f"features: {project}/f.npz"
    )

    def say(mirror, **arrays):
        np.savez(project / "f.npz", keys=np.array(["a", "b"]), **arrays)
        (project / "params.yaml").write_text(aligned.replace("mirror: false", f"mirror: {mirror}"))
        try:
            check(Paths(project))
        except ValueError as error:
            return str(error)

    grid = np.ones((2, 4, 3))
    assert "5 feature vectors an image are neither one nor a square grid" in say("false", features=np.ones((2, 5, 3)))
    assert say("false", features=grid) is say("true", features=np.ones((2, 3))) is None
    assert "the file has no features_mirror for mirror images" in say("true", features=grid)
    assert say("true", features=grid, features_mirror=grid) is None


def faults(project, **edits):
    text = (project / "params.yaml").read_text()
    for name, value in edits.items():
        section, _, key = name.partition("__")
        before, after = text.split(f"\n{section}:", 1)
        text = before + f"\n{section}:" + re.sub(rf"\n  {key}: \S+", f"\n  {key}: {value}", after, count=1)
    (project / "edited").mkdir(exist_ok=True)
    (project / "edited" / "params.yaml").write_text(text)
    try:
        check(Paths(project / "edited"))
    except ValueError as error:
        return str(error)


def test_raw_weights_are_those_of_the_last_step(project):
    snapshots = {"train__snapshot_every_steps": 600, "ema__step": 1200}
    assert faults(project, **snapshots) is None and faults(project, ema__weights="raw", ema__step=2400) is None
    assert "ema.step: raw weights are kept of the last step 2400 only" in faults(
        project, **snapshots, ema__weights="raw"
    )


def test_a_model_without_classes_has_no_metric_of_them(project):
    without = {"model__condition": "none", "register__metric": "class_agreement"}
    told = faults(project, **without).splitlines()
    assert any("'class_agreement' is not among the metrics: use one of fid, " in line for line in told)
    assert not any(
        "'inception_score' is" in line
        for line in faults(project, **without | {"register__metric": "inception_score"}).splitlines()
    )


def test_an_extractor_that_is_not_to_be_had_is_told_before_any_work(project, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(project / "home"))
    release = project / "release.pth"
    monkeypatch.setattr("dit.weights.INCEPTION_URL", release.as_uri())
    inception = {"reference__extractor": "inception"}
    told = faults(project, **inception)
    assert "release.pth cannot be reached" in told and "\n" not in told
    release.touch()
    assert faults(project, **inception, register__metric="sfid") is None, "it will be brought"
    assert "gone.pth is not there: bring it" in faults(project, **inception, reference__weights="gone.pth")
    assert "there is no extractor 'resnet': use inception" in faults(project, reference__extractor="resnet")
    assert "vgg16 needs the file" in faults(project, reference__extractor="vgg16")
    assert faults(project, reference__extractor="random") is None


@pytest.mark.parametrize(
    "extractor, metric, there",
    [
        ("classifier", "fid_digits_classifier_pooled_1k", True),
        ("classifier", "class_agreement_1k", True),
        ("classifier", "fid_digits_classifier_50k", False),
        ("classifier", "fid_inception_1k", False),
        ("random", "kid_random_1k", True),
        ("random", "fid_pooled", False),
    ],
)
def test_a_metric_is_known_by_its_full_name_too(project, extractor, metric, there):
    told = faults(project, reference__extractor=extractor, register__metric=metric)
    assert (told is None) == there and (there or f"{metric!r} is not among the metrics" in told)


def test_a_folder_to_begin_with_is_looked_at_before_any_work(project):
    small = ModelConfig("custom", 4, 32, 2, 2, learn_sigma=False)
    network, folder = DiT(small, input_size=8, in_channels=4, num_classes=3), project / "edited" / "theirs"
    folder.mkdir(parents=True)
    config = {"model": network_config(network), "objective": {"name": "transport"}, "license": "MIT"}
    save_checkpoint(folder, network.state_dict(), config)
    begin = {"train__init_from": "theirs"}
    assert "train.init_from: the weights are of a network with num_heads 2, not" in faults(project, **begin)
    begin |= {"model__hidden_size": 32, "model__depth": 2, "model__num_heads": 2}
    assert faults(project, **begin) is None
    passing = {"train__max_steps": 0, "train__class_dropout_prob": 0}
    assert "the weights have 3 classes, not 10" in faults(project, **begin, **passing)
    network = DiT(small, input_size=8, in_channels=4, num_classes=10)
    config["model"] = network_config(network)
    save_checkpoint(folder, network.state_dict(), config)
    assert faults(project, **begin, **passing) is None, "there is nothing to train the null label with"
    save_checkpoint(folder, network.state_dict(), config | {"objective": {"name": "diffusion"}})
    assert faults(project, **begin) is None
    assert "set objective.name to diffusion" in faults(project, **begin, **passing)
    assert "train.init_from: " in faults(project, **begin, model__patch_size=2)


def test_without_git_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ValueError, match="in no git repository, and DVC needs one: git init"):
        check(Paths(tmp_path))


def test_an_optional_section_is_checked_and_has_its_defaults_where_it_is_missing():
    @dataclass(frozen=True)
    class Extra:
        count: int = 3

    params = {"train": {"lr": 1, "max_steps": 1}}
    assert check_sections([stage], params, optional={"extra": Extra})["extra"] == Extra(3)
    given = check_sections([stage], params | {"extra": {"count": 4}}, optional={"extra": Extra})
    assert given["extra"] == Extra(4)
    with pytest.raises(ValueError, match=r"extra.cuont: no such setting \(did you mean extra.count\?\)"):
        check_sections([stage], params | {"extra": {"cuont": 4}}, optional={"extra": Extra})
    with pytest.raises(ValueError, match="extra: expected settings below it"):
        check_sections([stage], params | {"extra": None} | {"extra": 3}, optional={"extra": Extra})
    with pytest.raises(ValueError, match="extra: no such section"):
        check_sections([stage], params | {"extra": {}})


def test_inside_dvc_a_refusal_is_the_stages_outcome(project, monkeypatch):
    outcome = project / "scratch" / "outcome" / "scan.json"
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("lr: 4e-3", "lr: -1"))
    for stage in (None, "scan"):
        assert not outcome.exists()
        if stage:
            monkeypatch.setenv("DVC_STAGE", stage)
        with pytest.raises(ValueError, match="train.lr must be above 0"):
            check_in_dvc(Paths(project))
    told = json.loads(outcome.read_text())
    assert (told["stage"], told["status"], told["retry"]) == ("scan", "refused", False)
    assert told["message"] == "train.lr must be above 0 and below 10, got -1.0"


def test_in_a_worktree_the_files_that_settings_name_are_the_homes(project, tmp_path):
    home, text = tmp_path / "home", (project / "params.yaml").read_text()
    (home / "weights").mkdir(parents=True)
    np.savez(home / "weights" / "f.npz", keys=["a"], features=np.ones((1, 4), np.float32))
    (project / "params.yaml").write_text(text.replace("features: null", "features: weights/f.npz"))
    with pytest.raises(ValueError, match=r"encode.features: the file weights/f.npz is not there"):
        check(Paths(project))
    (project / "scratch").mkdir(exist_ok=True)
    (project / "scratch" / "home").write_text(str(home))
    assert check(Paths(project))["encode"].features == "weights/f.npz"
