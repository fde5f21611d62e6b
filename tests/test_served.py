"""The registered model: what it takes and what it answers."""

import base64
import io
import json
import sys

import mlflow.pyfunc
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from test_packing import PLAIN, packed
from tiny_model import CLASSES, SIZE

from dit import served
from dit.checkpoint import load_checkpoint
from dit.generation import generate
from dit.setting import Setting
from dit.vae import Autoencoder

STRONG = Setting("strong", 4.0, "heun", 3)
INNER = Setting("inner", 4.0, "sde_euler", 3, cfg_interval=(0.2, 0.9), diffusion_form="linear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("served"), [PLAIN, STRONG])


@pytest.fixture(scope="module")
def model(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))  # loading prepends the packed code
        yield mlflow.pyfunc.load_model(str(folder))


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    folder = packed(tmp_path_factory.mktemp("unconditional"), [PLAIN], classes=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield mlflow.pyfunc.load_model(str(folder))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A model of embeddings (2, 5) whose own setting is dopri5's, and its folder."""
    free = Setting("free", 1.5, "dopri5", rtol=0.1, atol=0.1)
    folder = packed(tmp_path_factory.mktemp("embedder"), [free, PLAIN, INNER], condition_shape=(2, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield mlflow.pyfunc.load_model(str(folder)), folder


def picture(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_it_draws_what_generation_draws(model, folder):
    answer = model.predict({"label": [2, 0, 1]})
    checkpoint = load_checkpoint(folder / "artifacts" / "ema")
    autoencoder = Autoencoder.load(folder / "artifacts" / "vae")
    expected = generate(checkpoint, autoencoder, PLAIN, torch.tensor([2, 0, 1]), [0, 1, 2], seed=5).numpy()
    assert list(answer.columns) == ["label", "seed", "image"] and list(answer["label"]) == ["two", "zero", "one"]
    assert list(answer["seed"]) == [0, 1, 2] and expected.shape == (3, SIZE, SIZE, 3)
    assert np.array_equal(np.stack([picture(text) for text in answer["image"]]), expected)


def test_classes_by_number_or_name_in_any_kind_of_table(model):
    by_number = model.predict({"label": [1]})["image"][0]
    for request in (
        {"label": ["one"]},
        {"label": ["1"]},
        {"label": "one"},
        pandas.DataFrame({"label": [1.0]}),
        pandas.DataFrame({"label": np.array([1], np.int32), "seed": np.array([0])}),
        [{"label": 1}],
    ):
        assert model.predict(request)["image"][0] == by_number
    assert len(model.predict({"label": ["zero", 2]})) == len(model.predict({"label": ["zero", "two"]})) == 2


def test_an_image_is_a_function_of_label_and_seed_wherever_it_is_asked_for(model):
    labels, seeds = [0, 1, 2, 0, 1, 2], [0, 0, 7, 3, 4, 9]  # more than one block
    together = model.predict({"label": labels, "seed": seeds})
    for i in (0, 2, 5):
        alone = model.predict({"label": [labels[i]], "seed": [seeds[i]]})
        near = np.abs(picture(alone["image"][0]).astype(int) - picture(together["image"][i]))
        assert near.max() <= 1  # the batch's shape may change the last bit
    assert len(set(together["image"])) == 6
    some = model.predict([{"label": 0}, {"label": 1}, {"label": 2, "seed": 7}])  # a row without one: its place
    assert list(some["seed"]) == [0, 1, 7]


def test_params_choose_a_setting_and_override_it(model):
    plain = model.predict({"label": [0]})["image"][0]
    strong = model.predict({"label": [0]}, params={"setting": "strong"})["image"][0]
    same = model.predict({"label": [0]}, params={"cfg_scale": 4.0, "sampler": "heun", "num_steps": 3})["image"][0]
    assert strong == same != plain


@pytest.mark.parametrize(
    ("request_", "params", "said"),
    [
        ({"label": [3]}, None, "label 3 is no class of this model: use 0 to 2, or a name (zero, one, two)"),
        ({"label": ["nine"]}, None, "label 'nine' is no class"),
        ({"label": [-1]}, None, "label -1 is no class"),
        ({"label": [1.5]}, None, "label 1.5 is no class"),
        ({"label": [None]}, None, "label None is no class"),
        ({"label": [0], "seed": [-4]}, None, "seed -4 is not"),
        ({"label": [0], "seed": ["x"]}, None, "seed 'x' is not"),
        ({"label": [0], "seed": [float("inf")]}, None, "seed inf is not"),
        ({"label": [0]}, {"setting": "best"}, "setting 'best' is none of this model's: use plain or strong"),
        ({"label": [0]}, {"sampler": "ddpm"}, "sampler 'ddpm' does not fit"),
        ({"label": [0]}, {"num_steps": 0}, "num_steps must be at least 1"),
    ],
)
def test_what_it_cannot_draw_is_said_in_one_line(model, request_, params, said):
    with pytest.raises(ValueError) as caught:
        model.predict(request_, params=params)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        served.read_labels(pandas.DataFrame({"label": []}), CLASSES)


def test_an_unconditional_model_takes_seeds_alone(unconditional):
    answer = unconditional.predict({"seed": [0, 1]})
    assert list(answer["label"]) == [None, None] and picture(answer["image"][1]).shape == (SIZE, SIZE, 3)
    with pytest.raises(ValueError, match="knows no classes"):
        served.read_labels(pandas.DataFrame({"label": [3]}), [])


def test_a_model_of_embeddings_takes_them_or_rows_of_its_bank(embedder):
    model, folder = embedder
    checkpoint = load_checkpoint(folder / "artifacts" / "ema")
    bank = checkpoint.conditions["features"].float()
    by_row = model.predict({"label": [4, 1]}, params={"setting": "plain"})
    expected = generate(
        checkpoint, Autoencoder.load(folder / "artifacts" / "vae"), PLAIN, torch.tensor([4, 1]), [0, 1], seed=5
    )
    assert np.array_equal(np.stack([picture(text) for text in by_row["image"]]), expected.numpy())
    assert list(by_row["label"]) == [CLASSES[4 % 3], CLASSES[1]]
    told = bank[[4, 1]].tolist()
    for request in ({"embedding": told}, [{"embedding": told[0]}, {"embedding": told[1]}]):
        answer = model.predict(request, params={"setting": "plain"})
        assert list(answer["image"]) == list(by_row["image"]) and list(answer["label"]) == [None, None]
    assert len(model.predict({"embedding": [told[0]], "seed": [3]}, params={"setting": "inner"})) == 1


def test_the_default_of_a_model_may_have_no_number_of_steps(embedder):
    model, _ = embedder
    row, few = model.unwrap_python_model().trial()
    assert len(model.predict(row, params=few)) == 1 and "num_steps" not in few
    same = model.predict({"label": [0]}, params={"sampler": "euler", "num_steps": 2, "cfg_scale": 1.0})
    assert same["image"][0] == model.predict({"label": [0]}, params={"setting": "plain"})["image"][0]
    with pytest.raises(ValueError, match="num_steps must be null for dopri5"):
        model.predict({"label": [0]}, params={"num_steps": 2})


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"label": [7]}, "label 7 is no row of this model's bank of embeddings: use 0 to 6"),
        ({"label": ["two"]}, "label 'two' is no row"),
        ({"embedding": [[1.0, 2.0]]}, "an embedding is no 2 lists of 5 finite numbers"),
        ({"embedding": [[[1.0] * 5, [float("nan")] * 5]]}, "an embedding is no 2 lists of 5 finite numbers"),
        ({"embedding": ["x"]}, "an embedding is no 2 lists of 5 finite numbers"),
        ([{"label": 0, "embedding": [[0.0] * 5] * 2}], "not by both"),
        ({"seed": [0]}, "no rows: ask for one image per row"),
    ],
)
def test_what_a_model_of_embeddings_cannot_draw_is_said(embedder, request_, said):
    with pytest.raises(ValueError) as caught:
        embedder[0].predict(request_)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_embedding_of_one_vector_may_be_given_as_one():
    rows, found = served.read_embeddings(
        pandas.DataFrame({"embedding": [[1, 2, 3], [4, 5, 6]], "seed": [7, 8]}), (1, 3)
    )
    assert found.tolist() == [[[1, 2, 3]], [[4, 5, 6]]] and list(rows["seed"]) == [7, 8]


@pytest.mark.parametrize("name", ["inputs", "dataframe_records", "dataframe_split"])
def test_embeddings_come_as_json_too(embedder, name, monkeypatch):
    from mlflow.pyfunc.scoring_server import predictions_to_json

    monkeypatch.setattr(sys, "path", list(sys.path))
    one, two = [[0.5] * 5] * 2, [[-0.5] * 5] * 2
    rows = {
        "inputs": {"embedding": [one, two]},
        "dataframe_records": [{"embedding": one}, {"embedding": two}],
        "dataframe_split": {"columns": ["embedding"], "data": [[one], [two]]},
    }
    asked = json.dumps({name: rows[name], "params": {"setting": "plain"}})
    predictions_to_json(mlflow.models.validate_serving_input(str(embedder[1]), asked), out := io.StringIO())
    answer = json.loads(out.getvalue())["predictions"]
    expected = embedder[0].predict([{"embedding": one}, {"embedding": two}], params={"setting": "plain"})
    assert [row["image"] for row in answer] == list(expected["image"]) and answer[0]["image"] != answer[1]["image"]


@pytest.mark.parametrize("name", ["inputs", "dataframe_records", "dataframe_split"])
def test_it_answers_json_as_mlflow_serves_it(folder, name, monkeypatch):
    from mlflow.pyfunc.scoring_server import predictions_to_json

    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = {
        "inputs": {"label": [1, "two"]},
        "dataframe_records": [{"label": 1}, {"label": "two"}],
        "dataframe_split": {"columns": ["label"], "data": [[1], ["two"]]},
    }
    asked = json.dumps({name: rows[name], "params": {"cfg_scale": 2.0}})
    predictions_to_json(mlflow.models.validate_serving_input(str(folder), asked), out := io.StringIO())
    answer = json.loads(out.getvalue())["predictions"]
    assert [row["label"] for row in answer] == ["one", "two"] and picture(answer[0]["image"]).shape == (SIZE, SIZE, 3)
