"""What a run reaches for: there, absent, out of reach."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_sources import config, encoded, picture
from test_storage import credentials, moto  # noqa: F401 (fixtures)

from dit import reach
from dit.paths import Paths
from dit.stages.scan import scan


def look(data, root):
    faults = []
    return *reach.source(data, Paths(root), faults), faults


@pytest.fixture
def photos(tmp_path):
    for name in ("cat/1.png", "cat/2.PNG", "dog/1.png", "dog/readme.txt"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(encoded(picture(len(name))))
    return tmp_path


def test_images_are_counted_without_being_read(photos):
    assert look(config(source="digits", num_classes=10), photos) == (1797, "1,797 images", [])
    assert look(config(source="photos"), photos) == (3, "3 images", [])  # relative to the root, as in a worktree
    (photos / "photos/more.zip").write_bytes(b"PK")
    assert look(config(source="photos"), photos) == (3, "3 images and those in archives", [])


def test_an_absent_or_empty_source_is_a_fault(tmp_path):
    count, told, (fault,) = look(config(source="nowhere"), tmp_path)
    assert count is None and told == "images out of reach" and "'nowhere' is not there" in fault
    (tmp_path / "empty").mkdir()
    count, _, (fault,) = look(config(source="empty"), tmp_path)
    assert count == 0 and "no PNG, JPEG or WebP image in 'empty'" in fault


def test_what_the_last_scan_counted_is_told_where_a_look_tells_less(photos, monkeypatch):
    data = config(source=str(photos / "photos"), num_classes=2)
    monkeypatch.chdir(photos)
    scan(data, paths=Paths(photos))
    monkeypatch.setattr(reach, "COUNT_SECONDS", -1.0)
    assert look(data, photos) == (3, "3 images at the last scan", [])
    assert look(config(source="photos", num_classes=2), photos) == (
        None,
        "more than 1 images",
        [],
    )  # another source than was scanned


@pytest.mark.slow
def test_a_bucket_and_a_dvc_remote_in_it(moto, tmp_path, monkeypatch):  # noqa: F811
    moto.put_object(Bucket="birds", Key="some/a/1.png", Body=b"x")
    assert look(config(source="s3://birds/some"), tmp_path) == (1, "1 images", [])
    count, told, (fault,) = look(config(source="s3://nosuch/some"), tmp_path)
    assert count is None and "there is no bucket 'nosuch'" in fault
    project = made(tmp_path / "project", "s3://birds/not/yet/anything", os.environ["AWS_ENDPOINT_URL"])
    assert reach.remote(project) == []
    (fault,) = reach.remote(made(tmp_path / "other", "s3://nosuch/x", os.environ["AWS_ENDPOINT_URL"]))
    assert fault.startswith("DVC remote there: s3://nosuch/x is out of reach") and "bucket does not exist" in fault


def made(project, url, endpoint=""):
    project.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", project], check=True)
    (project / ".dvc").mkdir()
    endpoint = f"    endpointurl = {endpoint}\n" * bool(endpoint)
    text = f"[core]\n    remote = there\n    analytics = false\n['remote \"there\"']\n    url = {url}\n{endpoint}"
    (project / ".dvc/config").write_text(text)
    return project


def test_a_folder_as_dvc_remote_needs_to_be_writable_only(tmp_path):
    assert reach.remote(made(tmp_path / "a", tmp_path / "not/yet/there")) == []
    (tmp_path / "file").write_text("x")
    (fault,) = reach.remote(made(tmp_path / "b", tmp_path / "file/below"))
    assert fault.startswith("DVC remote there: ") and "cannot be written" in fault
    assert reach.remote(tmp_path) == []  # no DVC, no remote


def test_a_pretrained_autoencoder_is_a_whole_folder_or_on_the_hub(tmp_path, monkeypatch):
    paths = Paths(tmp_path)
    assert reach.autoencoder(None, paths) == []
    (tmp_path / "sd/vae").mkdir(parents=True)
    (tmp_path / "sd/vae/config.json").write_text('{"block_out_channels": [8, 16]}')
    (fault,) = reach.autoencoder("sd", paths)
    assert "sd has no diffusion_pytorch_model.safetensors" in fault
    (tmp_path / "sd/vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert reach.autoencoder("sd", paths) == []
    assert reach.autoencoder_config("sd", paths) == {"block_out_channels": [8, 16]}
    (fault,) = reach.autoencoder(str(tmp_path / "no"), paths)
    assert f"the folder {tmp_path / 'no'} is not there" in fault
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (fault,) = reach.autoencoder("somebody/never-fetched", paths)
    assert "not in the hub's cache" in fault and "http://127.0.0.1:9/somebody/never-fetched" in fault
    (fault,) = reach.autoencoder("no folder/and no/id", paths)
    assert "neither a folder nor a hub id" in fault


def test_a_registered_model_must_be_known(tmp_path, monkeypatch):
    assert reach.registered_model("weights/folder", Paths(tmp_path)) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (fault,) = reach.registered_model("models:/birds@champion", Paths(tmp_path))
    assert fault.startswith("train.init_from: models:/birds@champion is not to be had") and "\n" not in fault
    (tmp_path / "scratch/initial/birds-3-0000-1111").mkdir(parents=True)
    assert reach.registered_model("models:/birds/3", Paths(tmp_path)) == []  # fetched before, kept
    assert reach.registered_model("models:/birds/4", Paths(tmp_path)) != []


def test_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(reach.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100e9))
    asked = {"shard": 60e9, "train": 45e9}
    assert reach.room(tmp_path, asked, ["train"]) == ([], [])
    faults, warnings = reach.room(tmp_path, asked, ["shard"])
    assert faults == [] and "60.00 GB" in warnings[0] and "cache.type" in warnings[0]
    faults, warnings = reach.room(tmp_path, asked, ["shard", "train"])
    assert "105.00 GB" in faults[0] and "100.00 GB are free" in faults[0] and warnings == []


def test_nothing_heavy_is_imported_before_it_is_needed():
    script = "import sys, dit.preflight; assert not {'torch', 'mlflow', 'boto3', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
