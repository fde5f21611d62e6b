"""`dit evaluate`: what a person gets who has images and a reference."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ports import free_port
from sklearn.datasets import load_digits

from dit import cli, scoretable
from dit.extractors import open_extractor
from dit.imagesets import open_images
from dit.perclass import distance_of
from dit.references import build_reference, read_reference, save_reference

ROOT = Path(__file__).parents[1]
RANDOM = ("--extractor", "random", "--bootstrap", "0")
COPIES = ("gen.npz", "--reference", "real.npz", "--training", "real.npz", "--heldout")


def digits():
    """uint8 images (1797, 16, 16, 3) and their labels."""
    told = load_digits()
    return np.repeat((told.images * 15.9).astype(np.uint8).repeat(2, 1).repeat(2, 2)[..., None], 3, -1), told.target


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """real.npz, heldout.npz, gen.npz (unseen digits with noise) and copies.npz (training digits with noise)."""
    folder = tmp_path_factory.mktemp("images")
    images, labels = digits()
    noise = np.random.default_rng(0).normal(0, 6, (200, *images.shape[1:]))
    for name, part in {"real": slice(600), "heldout": slice(600, 800), "gen": slice(800, 1000)}.items():
        np.savez(folder / f"{name}.npz", arr_0=images[part], labels=labels[part])
    for name, first in {"gen": 800, "copies": 0}.items():
        noisy = np.clip(images[first : first + 200] + noise, 0, 255).astype(np.uint8)
        np.savez(folder / f"{name}.npz", arr_0=noisy, labels=labels[first : first + 200])
    return folder


@pytest.fixture
def dit(made, tmp_path, monkeypatch, capsys):
    """dit("gen.npz", "--reference", "real.npz", ...) in an empty folder: (exit code, output, error lines)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        places = [str(made / a) if a.endswith(".npz") and (made / a).exists() else str(a) for a in map(str, arguments)]
        code = cli.main(["evaluate", *places])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def frechet(a, b):
    """By NumPy's eigenvalues of the product, which shares no code with ours."""
    (mean_a, mean_b), (cov_a, cov_b) = [x.mean(0) for x in (a, b)], [np.cov(x, rowvar=False) for x in (a, b)]
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots


def test_a_card_says_what_was_measured_and_on_what_terms(dit, made, tmp_path):
    code, out, err = dit("gen.npz", "--reference", "real.npz", "--extractor", "random", "--bootstrap", "4")
    assert code == 0 and err == "" and "gen.npz: 200 images of 16 x 16" in out and "no paper's figures" in out
    assert not re.search(" $", out, re.MULTILINE)
    card = json.loads((tmp_path / "gen.metrics.json").read_text())
    extractor = open_extractor("random")
    features = [
        extractor(torch.from_numpy(np.load(made / name)["arr_0"]).permute(0, 3, 1, 2))["pooled"].double().numpy()
        for name in ("gen.npz", "real.npz")
    ]
    assert card["metrics"]["fid_random_200"] == pytest.approx(frechet(*features), rel=1e-5)
    for record in card["records"]:
        assert record["count"] == 200 and record["extractor_digest"] == extractor.digest
        assert (record["reference_count"], record["reference_form"], record["image_size"]) == (600, "images", 16)
        assert re.search(rf"^{record['metric']} +{scoretable.number(record['value'])} .* 200 +600$", out, re.MULTILINE)
    assert card["extractor"]["official"] is False and "published weights" not in out
    terms = (card["reference"][name] for name in ("extractor", "extractor_digest", "resize"))
    assert tuple(terms) == (extractor.name, extractor.digest, extractor.resize)
    low, high = card["records"][0]["interval"]
    assert low < card["metrics"]["fid_random_200"] < high
    assert card["samples"]["digest"] == open_images(made / "gen.npz").digest
    assert set(card["classes"]) == {str(label) for label in range(10)} and "Classes that fail most" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gen.metrics.json"], "scratch files are gone"


def test_a_result_is_not_written_over_another_unasked(dit, tmp_path):
    (tmp_path / "gen.metrics.json").write_text("mine")
    code, out, err = dit("gen.npz", "--reference", "real.npz", *RANDOM)
    assert code == 2 and err == "dit: gen.metrics.json is there already: choose another name, or delete it\n"
    assert (tmp_path / "gen.metrics.json").read_text() == "mine"
    assert dit("gen.npz", "--reference", "real.npz", *RANDOM, "--output", "gen.metrics.json")[0] == 0
    assert json.loads((tmp_path / "gen.metrics.json").read_text())["metrics"]
    (tmp_path / "gen.metrics.json").unlink()
    (tmp_path / "gen.metrics.closest.png").write_text("mine")
    check = ("--training", "real.npz", "--heldout", "heldout.npz")
    assert "gen.metrics.closest.png is there already" in dit("gen.npz", "--reference", "real.npz", *RANDOM, *check)[2]
    assert dit("gen.npz", "--reference", "real.npz", *RANDOM)[0] == 0, "no picture is made"
    assert (tmp_path / "gen.metrics.closest.png").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_puts_everything_away_and_is_one_line(dit, tmp_path, monkeypatch, capsys, number):
    def interrupted(*_, folder, **__):
        folder.mkdir(parents=True)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    monkeypatch.setattr("dit.scorecard.evaluate_images", interrupted)
    with pytest.raises(SystemExit) as ended:
        dit("gen.npz", "--reference", "real.npz", *RANDOM)
    assert ended.value.code == 75 and signal.getsignal(number) is before
    assert capsys.readouterr().err == f"dit: interrupted by {number.name}: no result was written\n"
    assert list(tmp_path.iterdir()) == []


def test_one_of_several_processes_says_which_it_is_and_not_that_another_ended(dit, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = dit("nowhere.npz", "--reference", "real.npz", *RANDOM)
    assert code == 2 and re.fullmatch("dit: process 1: nowhere.npz is not there.*\n", err)
    lost = {"__name__": "torch.distributed.of_a_test"}
    exec("def evaluate(asked): raise RuntimeError('Connection closed by peer')", lost)
    monkeypatch.setattr("dit.scorecard.evaluate", lost["evaluate"])
    with pytest.raises(SystemExit) as ended:
        dit("gen.npz", "--reference", "real.npz", *RANDOM)
    assert ended.value.code == 75 and capsys.readouterr().err == ""


def test_a_folder_of_images_and_a_kept_reference_give_the_same_figures(dit, made, tmp_path):
    from PIL import Image

    for i, image in enumerate(np.load(made / "gen.npz")["arr_0"]):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "pictures" / f"{i:04d}.png")
    assert dit("gen.npz", "--reference", "real.npz", *RANDOM, "--keep-reference", "kept")[0] == 0
    assert dit("pictures", "--reference", "kept", "--bootstrap", "0")[0] == 0
    first, second = (json.loads(Path(f"{name}.metrics.json").read_text()) for name in ("gen", "pictures"))
    assert first["metrics"] == second["metrics"]
    assert first["reference"]["digest"] == second["reference"]["digest"]
    assert (
        "kept is there already"
        in dit("gen.npz", "--reference", "kept", "--output", "b.json", "--keep-reference", "kept")[2]
    )


def adm_file(path, made):
    """A reference in ADM's form: statistics of 600 images, of which 100 are there as images."""
    found = build_reference(open_images(made / "real.npz"), open_extractor("random"), path.parent / "scratch")
    mean, covariance = found.moments["pooled"]
    np.savez(path, mu=mean.numpy(), sigma=covariance.numpy(), arr_0=np.load(made / "real.npz")["arr_0"][:100])


def test_adms_batch_and_the_papers_table(dit, made, tmp_path):
    adm_file(tmp_path / "adm.npz", made)
    code, out, _ = dit("gen.npz", "--reference", "adm.npz", *RANDOM, "--papers")
    card = json.loads((tmp_path / "gen.metrics.json").read_text())
    counts = {told["metric"].split("_")[0]: told["reference_count"] for told in card["records"]}
    assert code == 0 and counts["fid"] is None and counts["precision"] == counts["recall"] == counts["kid"] == 100
    reasons = card["papers"]["fid"]["obstacles"]
    assert any("16 pixels" in why for why in reasons) and any("200 images, not 50,000" in why for why in reasons)
    assert any("random, not of Inception" in why for why in reasons)
    assert "images of 16 have none to stand beside" in out and "random's are assumed" in out
    assert dit("gen.npz", "--reference", "real.npz", *RANDOM, "--output", "b.json")[0] == 0
    assert json.loads(Path("b.json").read_text())["metrics"]["fid_random_200"] == pytest.approx(
        card["metrics"]["fid_random_200"], rel=1e-9
    )


def test_statistics_alone_give_a_distance_and_nothing_that_needs_images(dit, made, tmp_path):
    adm_file(tmp_path / "adm.npz", made)
    with np.load(tmp_path / "adm.npz") as content:
        np.savez(tmp_path / "stats.npz", mu=content["mu"], sigma=content["sigma"])
    code, _, _ = dit("gen.npz", "--reference", "stats.npz", *RANDOM)
    assert code == 0 and set(json.loads(Path("gen.metrics.json").read_text())["metrics"]) == {"fid_random_200"}


def test_a_model_that_copies_is_warned_of(dit):
    check = ("--training", "real.npz", "--heldout", "heldout.npz")
    honest, copying = (dit(name, "--reference", "real.npz", *RANDOM, *check) for name in ("gen.npz", "copies.npz"))
    assert honest[0] == copying[0] == 0
    assert "WARNING" in copying[1] and "WARNING" not in honest[1]
    card = json.loads(Path("copies.metrics.json").read_text())
    assert card["copies"]["warning"] and Path(card["copies"]["picture"]).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gen.npz", "--reference", "nowhere"), "nowhere is not there"),
        (("nowhere.npz", "--reference", "real.npz"), "nowhere.npz is not there"),
        (("big.npz", "--reference", "real.npz"), "holds images of 32 x 32 pixels, the reference of 16 x 16"),
        (("torn.npz", "--reference", "real.npz"), "torn.npz is torn"),
        (("gen.npz", "--reference", "torn.npz"), "torn.npz is torn"),
        (("few.npz", "--reference", "real.npz"), "need at least 4 images, got 3"),
        (("gen.npz", "--reference", "real.npz", "--labels", "labels.npy"), "needs a whole number for each of the 200"),
        (("gen.npz", "--reference", "real.npz", "--training", "real.npz"), "--training and --heldout belong together"),
        (("gen.npz", "--reference", "real.npz", "--extractor", "nosuch"), "nosuch"),
        (("gen.npz", "--reference", "real.npz", "--setting", "fast"), "are for --snapshots"),
        (("gen.npz", "--reference", "real.npz", "--snapshots", "train"), "one of the two"),
        (("--reference", "real.npz"), "one of the two"),
        (("gen.npz", "--reference", "real.npz", "--bootstrap", "1"), "bootstrap must be 0 .* got 1"),
        (("gen.npz", "--reference", "few.npz"), "few.npz: these metrics need at least 4 images, got 3"),
        (("gen.npz", "--reference", "real.npz", "--labels", "no.npy"), "--labels: no.npy is not there"),
        (("gen.npz", "--reference", "real.npz", "--output", "."), "--output: . is a folder"),
        (("big.npz", "--reference", "real.npz", "--output", "big.npz"), "written over what is to be read"),
        ((*COPIES, "real.npz"), "--heldout: .*real.npz is what --training names"),
        ((*COPIES, "few.npz"), "few.npz: 10 images or more are needed to look for copies, got 3"),
        ((*COPIES, "big.npz"), "big.npz holds images of 32 x 32 pixels, .*gen.npz of 16 x 16: to look for copies"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(dit, made, tmp_path, arguments, message):
    np.savez(tmp_path / "big.npz", arr_0=np.zeros((12, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 16, 16, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(7, np.int64))
    (tmp_path / "torn.npz").write_bytes((made / "gen.npz").read_bytes()[:5000])
    more = () if {"--extractor", "--bootstrap"} & set(arguments) else RANDOM
    random = () if "--extractor" in (*arguments, *more) else RANDOM[:2]
    code, out, err = dit(*arguments, *more, *random)
    assert code == 2 and out == "", "before anything is measured"
    assert err.count("\n") == 1 and err.startswith("dit: ")
    assert re.search(message, err), err
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob(".dit-*"))


def test_another_networks_features_are_refused(dit, made, tmp_path):
    made_with = build_reference(open_images(made / "real.npz"), open_extractor("random"), tmp_path / "scratch")
    save_reference(replace(made_with, extractor_digest="0" * 64), tmp_path / "other")
    code, _, err = dit("gen.npz", "--reference", "other", *RANDOM)
    assert code == 2 and "other weights of random (000000000000)" in err
    assert read_reference(tmp_path / "other").extractor == "random"


def test_without_weights_a_way_out_is_named(dit, monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    (tmp_path / "notes.json").write_text("{}")
    code, out, err = dit("gen.npz", "--reference", "notes.json")
    assert code == 2 and "images come as" in err and out == "", "no weights are brought for it"
    code, _, err = dit("gen.npz", "--reference", "real.npz")
    assert code == 2 and "use --extractor random, which needs no weights" in err and err.count("\n") == 1
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    code, _, err = dit("gen.npz", "--reference", "stats.npz")  # which another extractor does not fit
    assert code == 2 and "weights-inception" in err and "random" not in err


def test_the_pipelines_own_reference_brings_extractor_and_judge(dit, tmp_path):
    from test_classifier import QUICK, bars

    from dit.imagesets import from_array
    from dit.stages.reference import write_reference

    told = {"extractor": "bars_classifier", "num_classes": 2}
    (tmp_path / "reference").mkdir()
    write_reference(tmp_path / "reference", from_array(*bars(120)), from_array(*bars(80, seed=1)), told, QUICK)
    images, labels = bars(60, seed=2)
    np.savez(tmp_path / "bars.npz", arr_0=images)
    np.save(tmp_path / "asked.npy", labels)
    arguments = ("bars.npz", "--reference", "reference", "--bootstrap", "0")
    assert dit(*arguments, "--labels", "asked.npy")[0] == 0
    metrics = json.loads(Path("bars.metrics.json").read_text())["metrics"]
    assert metrics["class_agreement_60"] > 0.8 and "inception_score_bars_classifier_60" in metrics
    assert {"fid_bars_classifier_60", "fid_bars_classifier_pooled_60"} <= set(metrics)
    assert dit(*arguments, "--output", "unlabelled.json")[0] == 0
    without = json.loads(Path("unlabelled.json").read_text())["metrics"]
    assert metrics.keys() - without.keys() == {"class_agreement_60"}
    assert "use that extractor" in dit(*arguments, "--extractor", "random", "--output", "c.json")[2]
    keep = ("--keep-reference", "kept", "--output", "d.json")
    assert dit(*arguments, "--labels", "asked.npy", *keep)[0] == 0
    shutil.rmtree("reference")
    again = ("bars.npz", "--reference", "kept", "--bootstrap", "0", "--labels", "asked.npy", "--output", "e.json")
    assert dit(*again)[0] == 0, "what is kept needs nothing else"
    assert json.loads(Path("e.json").read_text())["metrics"] == metrics


def test_a_bias_is_told_only_where_there_is_one():
    told = {"metric": "fid_random_200", "points": [], "standard_error": 0.5}
    card = {
        "metrics": {"fid_random_200": 3.0},
        "reference": {"form": "images"},
        "extractor": {"name": "tiny"},
        "classes": {},
        "records": [],
    }
    falls, rises = (scoretable.notes(card | {"infinity": told | {"limit": limit}})[0] for limit in (2.0, 4.0))
    assert "falls as images are added: towards 2.0000" in falls and "about 1.0000 of it" in falls
    assert rises.startswith("fid_random_200 does not fall as images are added") and "4.0000" in rises


def test_a_sorted_file_is_told_of_and_the_score_of_a_sorted_file_is_not_compared():
    told = {"extractor": "inception", "count": 50_000, "reference_count": None}
    card = {
        "infinity": None,
        "reference": {"form": "images"},
        "extractor": {"name": "inception"},
        "classes": {},
        "records": [
            {"metric": "inception_score_inception_50k", "value": 298.0, **told},
            {"metric": "inception_score_file_order_inception_50k", "value": 62.0, **told},
        ],
    }
    (line,) = scoretable.notes(card)
    assert line == "The file is sorted, by class it seems: in its order the score is 62.00, shuffled 298.00."
    card["records"][1]["value"] = 296.0
    assert scoretable.notes(card) == []


def test_numbers_keep_four_digits():
    shown = [scoretable.number(value) for value in (0.00123456, 0.8265, 2.27, 19.47, 278.24, 12345.6, float("nan"))]
    assert shown == ["0.001235", "0.8265", "2.2700", "19.470", "278.24", "12345.6", "nan"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["images", "adm"])
def test_two_processes_give_the_figures_of_one(made, tmp_path, form):
    adm_file(tmp_path / "adm.npz", made)
    reference = made / "real.npz" if form == "images" else tmp_path / "adm.npz"
    arguments = ["evaluate", made / "gen.npz", "--reference", reference, *RANDOM]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    for name, start in {"one": [], "two": launcher}.items():
        command = [sys.executable, *start, "-m", "dit.cli", *arguments, "--output", tmp_path / f"{name}.json"]
        done = subprocess.run(list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("gen.npz: 200 images") == 1 and "images: 200/200 images" in done.stdout
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["metrics"].keys() == two["metrics"].keys()
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-6), name
    assert one["reference"] == two["reference"]


@pytest.mark.slow
def test_inception_by_a_file_of_weights_and_adms_batch(dit, made, tmp_path):
    """All of ADM's metrics by one pass; the same file of weights must be named for the kept reference."""
    from test_extractors import random_inception

    torch.save(random_inception().state_dict(), tmp_path / "weights.pth")
    extractor = open_extractor("inception", weights=tmp_path / "weights.pth")
    images = np.load(made / "real.npz")["arr_0"][:30]
    features = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
    statistics = {}
    for suffix, layer in {"": "pooled", "_s": "spatial"}.items():
        x = features[layer].double().numpy()
        statistics |= {f"mu{suffix}": x.mean(0), f"sigma{suffix}": np.cov(x, rowvar=False)}
    np.savez(tmp_path / "adm.npz", arr_0=images, **statistics)
    np.savez(tmp_path / "few.npz", arr_0=np.load(made / "gen.npz")["arr_0"][:20])
    named = ("--weights", "weights.pth", "--bootstrap", "0", "--papers")
    code, out, err = dit("few.npz", "--reference", "adm.npz", *named, "--keep-reference", "kept")
    assert code == 0, err
    card = json.loads(Path("few.metrics.json").read_text())
    kinds = {name.removesuffix("_inception_custom_20") for name in card["metrics"]}
    assert {"fid", "sfid", "precision", "recall", "inception_score", "inception_score_file_order"} <= kinds
    assert set(card["papers"]) == {"fid", "sfid", "inception_score", "precision", "recall"}
    assert all("inception_custom" in " ".join(told["obstacles"]) for told in card["papers"].values())
    ours = extractor(torch.from_numpy(np.load("few.npz")["arr_0"]).permute(0, 3, 1, 2))
    for name, layer in {"fid": "pooled", "sfid": "spatial"}.items():
        expected = distance_of(ours[layer], features[layer])
        assert card["metrics"][f"{name}_inception_custom_20"] == pytest.approx(expected, rel=1e-5)
    assert "kept was made with weights of one's own" in dit("few.npz", "--reference", "kept", "--output", "b.json")[2]
    assert dit("few.npz", "--reference", "kept", *named, "--output", "again.json")[0] == 0
    assert json.loads(Path("again.json").read_text())["metrics"] == pytest.approx(card["metrics"], rel=1e-9)
    torch.save(random_inception(seed=1).state_dict(), tmp_path / "weights.pth")
    assert "other weights of inception_custom" in dit("few.npz", "--reference", "kept", *named, "--output", "c.json")[2]


REAL_FILES = {name: os.environ.get(f"DIT_{name}") for name in ("INCEPTION_WEIGHTS", "ADM_SAMPLES", "ADM_REFERENCE")}


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.skipif(
    not all(REAL_FILES.values()), reason="needs DIT_INCEPTION_WEIGHTS, DIT_ADM_SAMPLES, DIT_ADM_REFERENCE"
)
def test_adms_own_samples_have_adms_own_figures(tmp_path, monkeypatch):
    """admnet_guided_upsampled_imagenet256.npz against VIRTUAL_imagenet256_labeled.npz, as ADM's README gives them."""
    monkeypatch.chdir(tmp_path)
    samples, reference = REAL_FILES["ADM_SAMPLES"], REAL_FILES["ADM_REFERENCE"]
    command = ["evaluate", samples, "--reference", reference, "--papers", "--bootstrap", "0", "--output", "adm.json"]
    assert cli.main([*command, "--weights", REAL_FILES["INCEPTION_WEIGHTS"]]) == 0
    card = json.loads(Path("adm.json").read_text())
    assert card["extractor"]["official"], "the weights are other ones than ADM's"
    expected = {
        "inception_score_file_order_inception_50k": (215.84, 0.05),
        "fid_inception_50k": (3.943, 0.005),
        "sfid_inception_50k": (6.140, 0.01),
        "precision_inception_50k": (0.8265, 0.005),  # ADM's are computed in float16, up to 0.003 off
        "recall_inception_50k": (0.5309, 0.005),
    }
    for name, (value, tolerance) in expected.items():
        assert card["metrics"][name] == pytest.approx(value, abs=tolerance), name
    assert not any(told["obstacles"] for told in card["papers"].values())
