"""The house's rules: who may import whom, and that each service has one door."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    0: "embedders blocks model cost timesteps diffusion denoising transport sampling likelihood stochastic ema alignment objective",
    1: "addresses pipeline paths locks states saving parts mirror retraining workload staleness onednn uncertainty nearest copies perclass config presets parallel team launch randomness progress schedule runtime places archives files sources arrays samples shards tars imagesets survey expectations start latents encoding heap dataset latentshards latentcache order feeding vae torchvision_cpu classifier evaluation inception weights extractors features neighbourhoods metrics "
    "checkpoint acceleration written compiling embeddings setting generation drawing snapshots grids contest adam learner training wrapping trainer initial finetune estimate info workload staleness solvers interop foreign diffusers_folder importing exporting published_dit trajectory scoretable scorecard papers foreign_statistics references monitor profiling curves",
    2: "entry outcome reuse resume tracking storage store outbox provenance registry recording packing served preview scoring speed reach capacity",
    3: "stages",
    4: "check preflight cli trial",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
DOORS = {
    "prefect": {"flows"},
    "mlflow": {"tracking", "served", "registry", "packing"},
    "diffusers": {"vae", "solvers", "published_dit"},
    "torch_fidelity": {"extractors", "embeddings"},
    "webdataset": set(),  # for tests only: see dit/shards.py
    "boto3": {"storage"},  # a place, which the stages hand down: what reads files knows of no service
    "torchdiffeq": {"sampling"},
}
HEAVY = {
    "torch",
    "mlflow",
    "prefect",
    "diffusers",
    "torch_fidelity",
    "torchvision",
    "torchdiffeq",
    "webdataset",
    "sklearn",
    "matplotlib",
    "boto3",
    "botocore",
    "pyarrow",
}


def room(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "flows" else parts[1]


@cache
def imported(file: Path) -> frozenset[str]:
    """Every module a file imports, anywhere in it, with the names taken from `dit` and `flows` spelled out."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide which room is meant"
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module in ("dit", "flows")
                else {node.module}
            )
    return frozenset(names)


def files() -> list[Path]:
    return [
        file
        for folder in ("dit", "flows")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if file.name != "__init__.py"
    ]


def dit_modules(file: Path) -> set[str]:
    """The rooms of dit that a file imports."""
    found = {name.split(".")[1] for name in imported(file) if name.startswith("dit.")}
    return {name for name in found if (ROOT / "dit" / f"{name}.py").exists() or name == "stages"}


def test_every_room_has_a_floor():
    assert {room(file) for file in files()} - {"flows"} == set(FLOOR)


@pytest.mark.parametrize("file", files(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_point_downwards(file):
    floor = 4 if room(file) == "flows" else FLOOR[room(file)]
    for other in dit_modules(file):
        same_floor_machinery = FLOOR[other] == floor and floor != 3
        assert FLOOR[other] < floor or same_floor_machinery, (
            f"{file.name} (floor {floor}) imports {other} (floor {FLOOR[other]})"
        )


def test_machinery_and_doors_import_each_other_in_no_circle():
    graph = {room(file): dit_modules(file) for file in files() if room(file) in FLOOR and FLOOR[room(file)] < 3}
    order: list[str] = []
    while graph:
        free = [name for name, others in graph.items() if not (others - set(order) - {name})]
        assert free, f"a circle among {sorted(graph)}"
        order += free
        graph = {name: others for name, others in graph.items() if name not in free}


@pytest.mark.parametrize("service", DOORS)
def test_each_service_has_one_door(service):
    users = {room(file) for file in files() if any(name.split(".")[0] == service for name in imported(file))}
    assert users == DOORS[service], f"{service} is imported in {users}"


@pytest.mark.parametrize("kind", ["cuda", "mps", "tpu", "xpu"])
def test_what_accelerators_differ_in_is_on_one_page(kind):
    """torch.cuda and its like: another kind of device is then a matter of dit/runtime.py."""
    users = {
        room(file)
        for file in files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if (node.value.id, node.attr) == ("torch", kind)
    }
    assert users <= {"runtime"}, f"torch.{kind} is used in {users}"


def test_mathematics_needs_torch_alone():
    standard = {"math", "dataclasses", "collections", "typing", "functools"}
    for name in FLOORS[0].split():
        tops = {module.split(".")[0] for module in imported(ROOT / "dit" / f"{name}.py")}
        late = {"torchdiffeq"} if name == "sampling" else set()  # inside the one function that solves with it
        assert tops <= standard | {"torch", "dit"} | late, name


def test_the_network_takes_no_part_in_training_or_guidance():
    assert dit_modules(ROOT / "dit" / "model.py") == {"blocks", "embedders"}
    assert not dit_modules(ROOT / "dit" / "trainer.py") & {"sampling", "vae", "features", "metrics", "generation"}


def test_light_rooms_import_nothing_heavy_at_their_top():
    for name in (
        "__init__",
        "cli",
        "trial",
        "curves",
        "paths",
        "config",
        "presets",
        "sources",
        "places",
        "archives",
        "files",
        "storage",
        "reach",
        "staleness",
        "preflight",
        "progress",
        "entry",
        "outcome",
        "launch",
        "team",
        "reuse",
        "stages/scan",
        "stages/report",
    ):
        tree = ast.parse((ROOT / "dit" / f"{name}.py").read_text())
        tops = {
            (alias.name if isinstance(node, ast.Import) else node.module).split(".")[0]
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not tops & HEAVY, f"dit/{name}.py imports {tops & HEAVY}"


def test_no_drawers():
    names = {file.stem for file in files()}
    assert not names & {"utils", "helpers", "common", "misc"} and not [name for name in names if name.endswith("_v2")]
