"""The registered model's own code ("models from code"): what `predict` does.

MLflow keeps this file beside the weights and runs it wherever the model is loaded, so nothing is pickled. A request is
a row per image, an answer too, both plain enough for JSON:

    model = mlflow.pyfunc.load_model("models:/dit-digits@champion")
    model.predict({"label": [3, "seven"]}, params={"cfg_scale": 2.0})

`label` is a class: its number, or its name. An unconditional model takes no labels. A model that is conditioned on
embeddings takes a column `embedding` (L lists of E numbers, or one list where L is 1) or, as `label`, the row of an
embedding in the bank that it carries. `seed` (optional; else 0, 1, 2 ...) is the number of the image: with the same
settings, number i is the i-th noise of the evaluated samples, wherever it is asked for. The answer's columns are `label`
(the class's name, where one is known), `seed` and `image` (a PNG in base64):

    PIL.Image.open(io.BytesIO(base64.b64decode(answer["image"][0])))
"""

import base64
import io
import math
import numbers
from collections.abc import Sequence
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy
import pandas


class ImageGenerator(mlflow.pyfunc.PythonModel):
    """Draws images of the classes asked for."""

    def load_context(self, context: Any) -> None:  # MLflow insists on the name
        from dit.checkpoint import load_checkpoint
        from dit.runtime import pick_device
        from dit.setting import Setting
        from dit.vae import Autoencoder

        device = pick_device("auto")
        self.checkpoint = load_checkpoint(context.artifacts["ema"], device)
        self.autoencoder = Autoencoder.load(context.artifacts["vae"], device)
        self.settings = {told["name"]: Setting(**told) for told in context.model_config["settings"]}
        self.seed, self.block_images = context.model_config["seed"], context.model_config["block_images"]

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict | None = None) -> pandas.DataFrame:
        """One row per image. Raises ValueError for a label, an embedding, a seed or a setting that the model does not
        know."""
        import torch

        from dit.generation import generate

        setting = self._setting(params or {})
        rows, wanted, names = self._wanted(model_input)
        seeds = read_seeds(rows)
        answer = []
        for start in range(0, len(wanted), self.block_images):
            block = slice(start, start + self.block_images)
            asked = torch.tensor(wanted[block])
            images = generate(self.checkpoint, self.autoencoder, setting, asked, seeds[block], seed=self.seed)
            answer += zip(names[block], seeds[block], map(png, images.numpy()), strict=True)
        return pandas.DataFrame(answer, columns=["label", "seed", "image"])

    def trial(self) -> tuple[dict[str, list], dict[str, Any]]:
        """A request for one image, and the params with which its default setting draws it in the fewest evaluations."""
        from dit.generation import num_choices

        row = {"label": [0], "seed": [0]} if num_choices(self.checkpoint) else {"seed": [0]}
        by_tolerance = next(iter(self.settings.values())).sampler == "dopri5"
        return row, {"rtol": 10.0, "atol": 10.0} if by_tolerance else {"num_steps": 2}

    def _wanted(self, rows: pandas.DataFrame) -> tuple[pandas.DataFrame, Sequence, list[str | None]]:
        """The request with a row for each image, what each is asked for, and its class's name."""
        from dit.generation import num_choices

        network, classes = self.checkpoint.model, self.checkpoint.config["classes"]
        if network.config.condition == "embeddings" and "embedding" in rows:
            if "label" in rows:
                raise ValueError("a row is asked for by `embedding` or by `label`, not by both: leave one out")
            rows, embeddings = read_embeddings(rows, network.condition_shape)
            return rows, embeddings, [None] * len(rows)
        if "embedding" in rows:
            raise ValueError("this model is not conditioned on embeddings: leave `embedding` out")
        if "label" in rows:  # MLflow makes one row of {"label": ["three", "seven"]}: these are two
            rows = rows.explode("label", ignore_index=True)
        if network.config.condition == "embeddings":
            wanted = read_bank_rows(rows, num_choices(self.checkpoint))
            labels = self.checkpoint.conditions["label"][wanted].tolist()
        else:
            classes = classes if network.num_classes else []
            labels = wanted = read_labels(rows, classes)
        return rows, wanted, [classes[label] if classes else None for label in labels]

    def _setting(self, params: dict[str, Any]) -> Any:
        from dit.setting import changed

        given = {name: value for name, value in params.items() if value is not None}
        name = given.pop("setting", next(iter(self.settings)))
        if name not in self.settings:
            raise ValueError(f"setting {name!r} is none of this model's: use {' or '.join(self.settings)}")
        return changed(self.settings[name], **given)


def read_labels(rows: pandas.DataFrame, classes: list[str]) -> list[int]:
    """The classes' numbers, one per row; zeros where there are no classes. Raises ValueError."""
    given = list(rows["label"]) if "label" in rows else [None] * len(rows)
    if not given:
        raise ValueError("no rows: ask for one image per row, such as {'label': [3]}")
    if not classes:
        if any(not _missing(label) for label in given):
            raise ValueError("this model knows no classes: leave `label` out and give `seed`")
        return [0] * len(given)
    return [_number(label, classes) for label in given]


def read_bank_rows(rows: pandas.DataFrame, size: int) -> list[int]:
    """Rows of a bank of `size` embeddings, one per row. Raises ValueError."""
    given = list(rows["label"]) if "label" in rows else []
    if not given:
        raise ValueError(
            "no rows: ask for one image per row, by `embedding`, or by a row of the bank as {'label': [3]}"
        )
    for label in given:
        if not _whole(label) or label >= size:
            raise ValueError(f"label {label!r} is no row of this model's bank of embeddings: use 0 to {size - 1}")
    return [int(label) for label in given]


def read_embeddings(rows: pandas.DataFrame, shape: tuple[int, int]) -> tuple[pandas.DataFrame, numpy.ndarray]:
    """The request with a row for each image, and its embeddings (N, L, E) float32 for `shape` (L, E). Raises
    ValueError."""
    L, E = shape
    found = []
    for given in rows["embedding"]:
        try:
            embedding = numpy.asarray(given, dtype=numpy.float32)
        except (ValueError, TypeError):
            embedding = numpy.empty(0)
        fits = embedding.shape[-2:] == (L, E) or (L == 1 and embedding.shape[-1:] == (E,))
        if not fits or embedding.ndim > 3 or not numpy.isfinite(embedding).all():
            raise ValueError(f"an embedding is no {L} lists of {E} finite numbers: found the shape {embedding.shape}")
        found.append(list(embedding.reshape(-1, L, E)))  # MLflow may make one row of several: these are several
    if not found:
        raise ValueError("no rows: ask for one image per row, such as {'embedding': [[...]]}")
    rows = rows.assign(embedding=found).explode("embedding", ignore_index=True)
    return rows, numpy.stack(list(rows["embedding"]))


def read_seeds(rows: pandas.DataFrame) -> list[int]:
    """The images' numbers: as given, else 0, 1, 2 ... Raises ValueError."""
    given = list(rows["seed"]) if "seed" in rows else [None] * len(rows)
    seeds = [i if _missing(seed) else seed for i, seed in enumerate(given)]
    for seed in seeds:
        if not _whole(seed):
            raise ValueError(f"seed {seed!r} is not a whole number of at least 0")
    return [int(seed) for seed in seeds]


def png(image: Any) -> str:
    """uint8 (H, W, 3) as a PNG in base64."""
    from PIL import Image

    Image.fromarray(image).save(file := io.BytesIO(), format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _whole(value: Any) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and float(value).is_integer() and value >= 0


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _number(label: Any, classes: list[str]) -> int:
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    text = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    raise ValueError(f"label {label!r} is no class of this model: use 0 to {len(classes) - 1}, or a name ({known})")


mlflow.models.set_model(ImageGenerator())
