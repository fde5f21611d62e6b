"""The registered model's own code ("models from code"): what `predict` does.

MLflow keeps this file beside the weights and runs it wherever the model is loaded, so nothing is pickled. A request is
a row per image, an answer too, both plain enough for JSON:

    model = mlflow.pyfunc.load_model("models:/dit-digits@champion")
    model.predict({"label": [3, "seven"]}, params={"cfg_scale": 2.0})

`label` is a class: its number, or its name. An unconditional model takes no labels. `seed` (optional; else 0, 1, 2 ...)
is the number of the image: with the same settings, number i is the i-th noise of the evaluated samples, wherever it is
asked for. The answer's columns are `label` (the class's name), `seed` and `image` (a PNG in base64):

    PIL.Image.open(io.BytesIO(base64.b64decode(answer["image"][0])))
"""

import base64
import io
import math
import numbers
from dataclasses import replace
from typing import Any

import mlflow.models
import mlflow.pyfunc
import pandas


class ImageGenerator(mlflow.pyfunc.PythonModel):
    """Draws images of the classes asked for."""

    def load_context(self, context: Any) -> None:  # MLflow insists on the name
        from dit.checkpoint import load_checkpoint
        from dit.generation import Setting
        from dit.runtime import pick_device
        from dit.vae import Autoencoder

        device = pick_device("auto")
        self.checkpoint = load_checkpoint(context.artifacts["ema"], device)
        self.autoencoder = Autoencoder.load(context.artifacts["vae"], device)
        self.settings = {told["name"]: Setting(**told) for told in context.model_config["settings"]}
        self.seed, self.block_images = context.model_config["seed"], context.model_config["block_images"]

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict | None = None) -> pandas.DataFrame:
        """One row per image. Raises ValueError for a label, a seed or a setting that the model does not know."""
        import torch

        from dit.generation import generate

        setting = self._setting(params or {})
        classes = self.checkpoint.config["classes"] if self.checkpoint.model.num_classes else []
        if "label" in model_input:  # MLflow makes one row of {"label": ["three", "seven"]}: these are two
            model_input = model_input.explode("label", ignore_index=True)
        labels = read_labels(model_input, classes)
        seeds = read_seeds(model_input)
        rows = []
        for start in range(0, len(labels), self.block_images):
            block = slice(start, start + self.block_images)
            wanted = torch.tensor(labels[block])
            images = generate(self.checkpoint, self.autoencoder, setting, wanted, seeds[block], seed=self.seed)
            names = [classes[label] if classes else None for label in labels[block]]
            rows += zip(names, seeds[block], map(png, images.numpy()), strict=True)
        return pandas.DataFrame(rows, columns=["label", "seed", "image"])

    def _setting(self, params: dict[str, Any]) -> Any:
        given = {name: value for name, value in params.items() if value is not None}
        name = given.pop("setting", next(iter(self.settings)))
        if name not in self.settings:
            raise ValueError(f"setting {name!r} is none of this model's: use {' or '.join(self.settings)}")
        return replace(self.settings[name], **given)


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


def read_seeds(rows: pandas.DataFrame) -> list[int]:
    """The images' numbers: as given, else 0, 1, 2 ... Raises ValueError."""
    given = list(rows["seed"]) if "seed" in rows else [None] * len(rows)
    seeds = [i if _missing(seed) else seed for i, seed in enumerate(given)]
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, numbers.Real) or not float(seed).is_integer() or seed < 0:
            raise ValueError(f"seed {seed!r} is not a whole number of at least 0")
    return [int(seed) for seed in seeds]


def png(image: Any) -> str:
    """uint8 (H, W, 3) as a PNG in base64."""
    from PIL import Image

    Image.fromarray(image).save(file := io.BytesIO(), format="PNG")
    return base64.b64encode(file.getvalue()).decode()


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
