"""A model packed for the registry, with the code that draws and exact pins, and tried out where no checkout is seen.

What runs inside the model is `dit.served`. MLflow is imported late: to find the files that are packed takes none.
"""

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
ALWAYS = ("mlflow", "pandas")  # what dit.served itself needs
TRY_SECONDS = 1800.0  # to fetch the largest model, load it and draw one image on a CPU


def pack(
    folder: Path, *, ema: Path, vae: Path, settings: list[Any], seed: int, block_images: int, entry: dict[str, Any]
) -> None:
    """Write the MLflow model folder. The first of `settings` is what `predict` uses unasked; `entry` says what it is
    in MLflow (the arguments of `mlflow.models.Model`)."""
    import mlflow.pyfunc
    from mlflow.models import Model

    condition = condition_of(json.loads((ema / "config.json").read_text()))
    told = json.loads(json.dumps([asdict(setting) for setting in settings]))  # MLflow's YAML knows no tuples
    served, *files = shipped_files()
    with tempfile.TemporaryDirectory() as there:
        code = Path(there) / "dit"
        code.mkdir()
        for file in files:
            shutil.copyfile(file, code / file.name)
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(served),
            code_paths=[str(code)],
            artifacts={"ema": str(ema), "vae": str(vae)},
            model_config={"settings": told, "seed": seed, "block_images": block_images},
            signature=signature(condition, settings[0].name),
            input_example=(
                {"seed": [0]} if condition == "none" else {"label": [0], "seed": [0]},
                {"setting": settings[0].name},
            ),
            pip_requirements=requirements([served, *files]),
            mlflow_model=Model(**entry),
        )


def condition_of(config: dict[str, Any]) -> str:
    """What a request tells of an image, by a checkpoint's config.json: classes, embeddings, or none."""
    condition = config["model"].get("condition", "classes")
    return "none" if condition == "classes" and not config["model"]["num_classes"] else condition


def signature(condition: str, setting: str) -> Any:
    """What a request and an answer look like."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    asked = {
        "classes": [ColSpec(AnyType(), "label")],  # a number or a name
        "embeddings": [ColSpec(AnyType(), name, required=False) for name in ("embedding", "label")],
        "none": [],
    }[condition]
    return ModelSignature(
        inputs=Schema([*asked, ColSpec(AnyType(), "seed", required=condition == "none")]),
        outputs=Schema([ColSpec("string", "label"), ColSpec("long", "seed"), ColSpec("string", "image")]),
        params=ParamSchema(
            [
                ParamSpec("setting", "string", setting),
                ParamSpec("cfg_scale", "double", None),  # these override the named setting
                ParamSpec("num_steps", "long", None),
                ParamSpec("sampler", "string", None),
                ParamSpec("rtol", "double", None),
                ParamSpec("atol", "double", None),
            ]
        ),
    )


def shipped_files() -> list[Path]:
    """served.py, and the files of this package that it needs: what it imports, what these import, and so on."""
    found, queue = [], [PACKAGE / "served.py", PACKAGE / "__init__.py"]
    while queue:
        found.append(queue.pop(0))
        names = [name.split(".", 1)[1] for name in _imports(found[-1]) if name.startswith("dit.")]
        files = {PACKAGE / f"{name}.py" for name in names if (PACKAGE / f"{name}.py").is_file()}
        queue += sorted(files - {*found, *queue})
    return found


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
import base64, os, sys, mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
row, few = model.unwrap_python_model().trial()
image = base64.b64decode(model.predict(row, params=few)["image"][0])
assert image.startswith(b"\\x89PNG"), "the answer is no PNG"
os._exit(0)  # tidying up after so many imports takes seconds
"""


def try_out(model_uri: str, tracking_uri: str) -> None:
    """Load a registered model and draw one image in as few steps as can be, in a process that does not see this
    checkout.

    Raises ValueError with the other process's last words where that fails, and where it takes TRY_SECONDS.
    """
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-P", "-c", _TRY, model_uri]
        where = {"cwd": elsewhere, "env": environment, "timeout": TRY_SECONDS}
        try:
            done = subprocess.run(command, **where, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            late = f"{model_uri} was registered but drew no image within {TRY_SECONDS:g} seconds"
            raise ValueError(f"{late}: run register again where it can be fetched and run faster") from None
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"{model_uri} was registered but cannot draw: {last}")
