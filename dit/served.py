"""The registered model's own code ("models from code"): what `predict` does, and what is packed with it.

MLflow keeps this file beside the weights and runs it wherever the model is loaded, so nothing is pickled. A request is
a row per image, an answer too, both plain enough for JSON:

    model = mlflow.pyfunc.load_model("models:/dit-digits@champion")
    model.predict({"label": [3, "seven"]}, params={"cfg_scale": 2.0})

`label` is a class: its number, or its name. An unconditional model takes no labels. `seed` (optional; else 0, 1, 2 ...)
is the number of the image: with the same settings, number i is the i-th noise of the evaluated samples, wherever it is
asked for. The answer's columns are `label` (the class's name), `seed` and `image` (a PNG in base64):

    PIL.Image.open(io.BytesIO(base64.b64decode(answer["image"][0])))
"""

import ast
import base64
import importlib.metadata
import io
import math
import numbers
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import pandas

ALWAYS = ("mlflow", "pandas")  # what this file itself needs


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
            numbers = torch.tensor(labels[block])
            images = generate(self.checkpoint, self.autoencoder, setting, numbers, seeds[block], seed=self.seed)
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


# --- packing: runs where the model is registered, never where it is served -------------------------------------------


def pack(
    folder: Path, *, ema: Path, vae: Path, settings: list[Any], seed: int, block_images: int, entry: dict[str, Any]
) -> None:
    """Write the MLflow model folder. The first of `settings` is what `predict` uses unasked; `entry` says what it is
    in MLflow (the arguments of `mlflow.models.Model`)."""
    import json

    from mlflow.models import Model

    conditional = json.loads((ema / "config.json").read_text())["model"]["num_classes"] > 0
    files = shipped_files()
    with tempfile.TemporaryDirectory() as there:
        for file in files:
            copy = Path(there) / file.relative_to(files[0].parents[1])
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
        mlflow.pyfunc.save_model(
            folder,
            python_model=__file__,
            code_paths=[f"{there}/dit"],
            artifacts={"ema": str(ema), "vae": str(vae)},
            model_config={"settings": [asdict(s) for s in settings], "seed": seed, "block_images": block_images},
            signature=signature(conditional, settings[0].name),
            input_example=(
                {"label": [0], "seed": [0]} if conditional else {"seed": [0]},
                {"setting": settings[0].name},
            ),
            pip_requirements=requirements([Path(__file__), *files]),
            mlflow_model=Model(**entry),
        )


def signature(conditional: bool, setting: str) -> Any:
    """What a request and an answer look like."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    label = [ColSpec(AnyType(), "label")] if conditional else []  # a number or a name
    return ModelSignature(
        inputs=Schema([*label, ColSpec(AnyType(), "seed", required=not conditional)]),
        outputs=Schema([ColSpec("string", "label"), ColSpec("long", "seed"), ColSpec("string", "image")]),
        params=ParamSchema(
            [
                ParamSpec("setting", "string", setting),
                ParamSpec("cfg_scale", "double", None),  # these three override the named setting
                ParamSpec("num_steps", "long", None),
                ParamSpec("sampler", "string", None),
            ]
        ),
    )


def shipped_files() -> list[Path]:
    """The files of this package that `predict` needs, its __init__.py first: what this file imports, and so on."""
    package = Path(__file__).resolve().parent
    found, queue = [], [package / "__init__.py", Path(__file__).resolve()]
    while queue:
        file = queue.pop(0)
        found.append(file)
        names = [name.split(".", 1)[1] for name in _imports(file) if name.startswith("dit.")]
        queue += sorted(
            {package / f"{name}.py" for name in names if (package / f"{name}.py").is_file()} - {*found, *queue}
        )
    return [file for file in found if file != Path(__file__).resolve()]


def requirements(files: list[Path]) -> list[str]:
    """Exact pins, as installed here, of the distributions that these files import."""
    modules = {name.split(".")[0] for file in files for name in _imports(file)} - set(sys.stdlib_module_names) - {"dit"}
    distributions = importlib.metadata.packages_distributions()
    wanted = {*ALWAYS, *(distributions[module][0] for module in modules if module in distributions)}
    # A local version (2.13.0+cpu) names this machine's build and is on no index.
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in sorted(wanted)]


def _imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


_TRY = """
import gc; gc.set_threshold(100_000)  # see dit.stages
import base64, json, os, sys, mlflow
row, model = json.loads(sys.argv[2]), mlflow.pyfunc.load_model(sys.argv[1])
image = base64.b64decode(model.predict(row)["image"][0])
assert image.startswith(b"\\x89PNG"), "the answer is no PNG"
os._exit(0)  # tidying up after so many imports takes seconds
"""


def try_out(model_uri: str, tracking_uri: str, conditional: bool) -> None:
    """Load a registered model and draw one image, in a process that does not see this checkout.

    Raises ValueError with the other process's last words where that fails.
    """
    import json

    row = {"label": [0], "seed": [0]} if conditional else {"seed": [0]}
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-P", "-c", _TRY, model_uri, json.dumps(row)]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"{model_uri} was registered but cannot draw: {last}")


mlflow.models.set_model(ImageGenerator())
