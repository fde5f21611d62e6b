"""What several test files need: reference tensors, and one thread, so that sums come out the same everywhere."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")

import hypothesis
import pytest
from ports import free_port

GOLDEN = Path(__file__).parent / "golden"


# A shell that starts the tests in the background has SIGINT ignored, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No example is late because the machine had something else to do just then.
patience = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("patient", **patience)
hypothesis.settings.load_profile("patient")


def pytest_collection_modifyitems(items):
    """The files that take longest come first: the other processes of a parallel run do the rest meanwhile."""
    longest = ["test_orchestration.py", "test_pipeline.py", "test_local.py", "test_flows.py"]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """Where the first Prefect server leaves a copy of its fresh database: its migrations take longer than its start."""
    return tmp_path_factory.mktemp("migrated") / "prefect-test.db"


@pytest.fixture(scope="module")
def server(migrated):
    """A Prefect server of its own on a fresh database, for one test file."""
    from prefect.testing import utilities

    folder = Path(tempfile.mkdtemp())  # Prefect deletes it at the end
    if migrated.exists():
        shutil.copy(migrated, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utilities, "mkdtemp", lambda: str(folder))
        patch.setattr(utilities, "_find_available_port", free_port, raising=False)
        with utilities.prefect_test_harness(server_startup_timeout=120):
            if not migrated.exists():
                with contextlib.closing(sqlite3.connect(folder / migrated.name)) as database:
                    with contextlib.closing(sqlite3.connect(migrated)) as copy:
                        database.backup(copy)
            yield


@pytest.fixture(scope="session")
def golden():
    """golden("posemb") gives the tensors of tests/golden/posemb.safetensors, and the file's `config`."""
    from safetensors import safe_open

    def read(name):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, config

    return read


@pytest.fixture(scope="session")
def golden_network(golden):
    """The network of a golden file, with its weights, in eval mode."""
    from dit.model import DiT, ModelConfig

    def build(name):
        tensors, shape = golden(name)
        config = ModelConfig(
            name="custom",
            patch_size=shape["patch_size"],
            hidden_size=shape["hidden_size"],
            depth=shape["depth"],
            num_heads=shape["num_heads"],
            learn_sigma=shape.get("learn_sigma", True),
        )
        network = DiT(config, input_size=shape["input_size"], in_channels=4, num_classes=shape["num_classes"])
        network.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
        return network.eval(), tensors

    return build
