import json
import os
import shutil
import threading
import time

import pytest
import torch
from test_saving import killed, names
from test_states import VALUES, same, tensors
from test_storage import credentials, faulty, moto  # noqa: F401 (fixtures)
from waiting import until

from dit import mirror as room
from dit import storage
from dit.mirror import FolderShelf, Mirror
from dit.paths import file_sha256
from dit.saving import Saver
from dit.states import SavedState, TrainingState, count, latest_state, steps


class Slow(FolderShelf):
    """A folder far away: what matches `stuck` stays half copied until `go`."""

    def __init__(self, root, stuck=""):
        super().__init__("far", root)
        self.stuck, self.go, self.at = stuck, threading.Event(), ""

    def put(self, name, file):
        if self.stuck and self.stuck in name and not self.go.is_set():
            self._unfinished.write_bytes(file.read_bytes()[:7])
            self.at = name
            assert self.go.wait(60)
        super().put(name, file)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "here" / "abc"


@pytest.fixture
def far(tmp_path):
    return tmp_path / "far"


def save(folder, shelf, *told, keep=2, say=print, beside=False):
    """Save steps, each copied before the next; the mirror and the saver."""
    mirror = Mirror(shelf, folder, keep, say=say)
    saver = Saver(folder, keep, mirror=mirror)
    for step in told:
        if beside:
            (folder / "snapshots").mkdir(exist_ok=True)
            (folder / "snapshots" / f"power-0.05-{step:08d}.safetensors").write_bytes(b"%d" % step)
        saver.save(TrainingState(step, tensors(step), VALUES))
        saver.close()
    return mirror, saver


def elsewhere(tmp_path, shelf, above=-1, up_to=100, say=print):
    """What another machine gets."""
    return Mirror(shelf, tmp_path / "there" / "abc", 2, say=say).fetch(above, up_to)


def test_another_machine_gets_all_that_a_training_needs(tmp_path, folder, far, capsys):
    shelf = FolderShelf("far", far)
    folder.mkdir(parents=True)
    (folder / "work.json").write_text(json.dumps({"code": "c", "mlflow_run_id": "r"}))
    save(folder, shelf, 5, 10, 15, beside=True)
    states = [f"step-000000{step}.{end}" for step in (10, 15) for end in ("json", "safetensors")]
    assert names(far) == ["snapshots", *states, "work.json"]
    there = tmp_path / "there" / "abc"
    found = elsewhere(tmp_path, shelf)
    assert found == latest_state(there) and found.step == 15 and found.values == VALUES
    assert same(found.read(), tensors(15)) and names(there) == ["snapshots", *states[2:]]
    assert names(there / "snapshots") == names(folder / "snapshots") and len(names(there / "snapshots")) == 3
    assert Mirror(shelf, there, 2).notes() == {"code": "c", "mlflow_run_id": "r"}
    assert elsewhere(tmp_path, shelf, above=15) is None
    (there / "snapshots" / "power-0.05-00000010.safetensors").unlink()
    assert elsewhere(tmp_path, shelf, up_to=14).step == 10, "a training of fewer steps"
    assert (there / "snapshots" / "power-0.05-00000010.safetensors").read_bytes() == b"10"
    assert not capsys.readouterr().out


def test_averages_kept_on_the_way_travel_once(tmp_path, folder, far):
    class Counting(FolderShelf):
        def put(self, name, file):
            sent.append(name.rpartition("-")[2])
            super().put(name, file)

    def beside():
        taken = [int(name.partition(".")[0]) for name in sent if name.endswith(".safetensors")]
        sent.clear()
        return taken

    sent = []
    save(folder, Counting("far", far), 5, 10, beside=True)
    assert sorted(beside()) == [5, 5, 10, 10], "the state and what is beside it"
    for file in (folder / "snapshots").iterdir():
        os.utime(file, (time.time() - 60,) * 2)
    save(folder, Counting("far", far), 15, beside=True)
    assert beside() == [15, 15], "another process knows what is there"
    (folder / "snapshots" / "power-0.05-00000010.safetensors").write_bytes(b"01")
    save(folder, Counting("far", far), 20)
    assert sorted(beside())[0] == 10, "this one was made again"
    mirror = Mirror(Counting("far", far), tmp_path / "there" / "abc", 2)
    saver = Saver(mirror.folder, 2, mirror=mirror)
    assert mirror.fetch(-1, 100).step == 20 and len(names(mirror.folder / "snapshots")) == 3
    saver.save(TrainingState(25, tensors(25), VALUES))
    saver.close()
    assert beside() == [25], "what came from there does not go back"


@pytest.mark.parametrize("harm", ["file", "lost", "sidecar", "foreign"])
def test_what_is_torn_or_foreign_there_is_named_and_passed_over(tmp_path, folder, far, harm):
    shelf, said = FolderShelf("far", far), []
    save(folder, shelf, 5, 10)
    file, sidecar = far / "step-00000010.safetensors", far / "step-00000010.json"
    if harm == "file":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "lost":
        file.unlink()
    else:
        sidecar.write_text("{" if harm == "sidecar" else sidecar.read_text().replace('"abc"', '"xyz"'))
    assert elsewhere(tmp_path, shelf, say=said.append).step == 5
    assert len(said) == 1 and "step-00000010" in said[0] and said[0].endswith("passed over for the state before it")
    assert names(tmp_path / "there" / "abc") == ["step-00000005.json", "step-00000005.safetensors"]


def test_a_slow_copy_delays_no_save_and_the_newest_is_copied_next(folder, far):
    shelf = Slow(far, stuck="step-00000005.safetensors")
    mirror = Mirror(shelf, folder, 1)
    saver = Saver(folder, 1, mirror=mirror)
    saver.save(TrainingState(5, tensors(5), VALUES))
    until(lambda: shelf.at)
    for step in (10, 15):
        saver.save(TrainingState(step, tensors(step), VALUES))
    saver.wait()
    assert latest_state(folder).step == 15 and steps(folder) == [5, 15], "what is being copied stays"
    said = []
    mirror.say = said.append
    saver.close(0.01)
    assert said == [f"run.mirror: {far}: there was no time left to copy the state of step 15"]
    assert mirror.steps() == [], "what is half there does not count"
    shelf.go.set()
    saver.close()
    assert names(far) == ["step-00000015.json", "step-00000015.safetensors"]
    saver.save(TrainingState(20, tensors(20), VALUES))
    saver.close()
    assert steps(folder) == [20] and mirror.steps() == [20]


def test_a_copy_that_fails_is_said_and_the_next_state_is_another_try(folder, far):
    said, shelf = [], FolderShelf("far", far)
    mirror, saver = save(folder, shelf, 5, say=said.append)
    shutil.rmtree(far)
    far.write_bytes(b"the disk is not mounted")
    saver.save(TrainingState(10, tensors(10), VALUES))
    saver.close()
    assert len(said) == 1 and said[0].startswith(
        "run.mirror: the state of step 10 was not copied, the next one will be"
    )
    assert latest_state(folder).step == 10
    far.unlink()
    far.mkdir()
    saver.save(TrainingState(15, tensors(15), VALUES))
    saver.close()
    assert mirror.steps() == [15] and len(said) == 1


@pytest.mark.parametrize("keep", [1, 2, 5, 9])
def test_the_last_ones_are_kept(folder, far, keep):
    save(folder, FolderShelf("far", far), *range(1, 8), keep=keep)
    assert FolderShelf("far", far) and names(far) == names(folder)


@pytest.mark.parametrize("stuck", ["step-00000010.safetensors", "step-00000010.json"])
def test_sigkill_in_a_copy_harms_nothing(tmp_path, folder, far, stuck):
    save(folder, FolderShelf("far", far), 5)
    with killed(lambda: save(folder, Slow(far, stuck), 10)):
        until(lambda: (far / ".unfinished").exists() and (far / ".unfinished").stat().st_size == 7)
    assert latest_state(folder).step == 10
    assert elsewhere(tmp_path, FolderShelf("far", far)).step == 5
    save(folder, FolderShelf("far", far), 15, keep=1)
    assert names(far) == ["step-00000015.json", "step-00000015.safetensors"]


def test_sigkill_while_it_is_brought_here_leaves_what_does_not_count(tmp_path, folder, far):
    save(folder, FolderShelf("far", far), 5)
    there = tmp_path / "there" / "abc"

    class Stuck(FolderShelf):
        def read(self, file, start=0, size=None, *, version=""):
            return super().read(file) if file.endswith(".json") else time.sleep(60)

    with killed(lambda: elsewhere(tmp_path, Stuck("far", far))):
        until(lambda: list(there.glob(".step*/*")))
    assert latest_state(there) is None
    assert elsewhere(tmp_path, FolderShelf("far", far)).step == 5 and len(names(there)) == 2


def test_only_a_training_that_is_made_again_takes_the_place_of_a_longer_one(folder, far):
    for instead, left in ((False, [4, 5, 10]), (True, [4])):
        save(folder, FolderShelf("far", far), 5, 10)
        shutil.rmtree(folder)
        mirror, saver = save(folder, FolderShelf("far", far))
        mirror.instead = instead
        saver.save(TrainingState(4, tensors(4), VALUES))
        saver.close()
        assert mirror.steps() == left


def test_the_parts_of_several_processes_are_copied_as_they_are(tmp_path, folder, far):
    place = folder / "step-00000005"
    place.mkdir(parents=True)
    for name in ("shard-00001-model", "shard-00002-model"):
        (place / f"{name}.safetensors").write_bytes(name.encode())
    files = {f"{place.name}/{file.name}": file_sha256(file) for file in sorted(place.iterdir())}
    count(SavedState(5, VALUES, place, files))
    mirror = Mirror(FolderShelf("far", far), folder, 1)
    mirror.offer(latest_state(folder))
    mirror.close()
    found = elsewhere(tmp_path, FolderShelf("far", far))
    assert found.path == tmp_path / "there" / "abc" / "step-00000005" and found == latest_state(found.path.parent)
    save(folder, FolderShelf("far", far), 10, keep=1)
    assert names(far) == ["step-00000010.json", "step-00000010.safetensors"]


def test_a_place_that_can_not_be_is_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="^run.mirror: 'far' can't be written to .*: correct the path$"):
        FolderShelf("far", tmp_path / "file" / "sub")


def test_a_bucket_that_fails_now_and_then(tmp_path, folder, faulty):  # noqa: F811
    faulty.fault = lambda path, count: ("500", "", "", "reset", "", "", "corrupt", "", "")[count % 9]
    shelf = storage.Bucket("s3://b/states/train/abc", "run.mirror")
    save(folder, shelf, 5, 10, 15, beside=True)
    assert steps(folder) == [10, 15] and Mirror(shelf, folder, 2).steps() == [10, 15]
    found = elsewhere(tmp_path, shelf)
    assert same(found.read(), tensors(15)) and len(names(found.path.parent / "snapshots")) == 3


@pytest.mark.slow
def test_sigkill_in_the_parts_of_an_upload(tmp_path, folder, moto, monkeypatch):  # noqa: F811
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(storage, "PUTTERS", 1)
    monkeypatch.setattr(room, "PIECE_BYTES", 3 * 2**20)
    bucket = "s3://birds/states/train/abc"
    save(folder, storage.Bucket(bucket, "run.mirror"), 5)

    class Stuck(storage.Bucket):
        begun = False

        def _write(self, name, ask):
            answer = super()._write(name, ask)
            if self.begun:  # and its first part is there
                time.sleep(100)
            self.begun = "UploadId" in answer
            return answer

    def large(kind=storage.Bucket):
        mirror = Mirror(kind(bucket, "run.mirror"), folder, 2)
        saver = Saver(folder, 2, mirror=mirror)
        saver.save(TrainingState(10, {"a": torch.randn(8_000_000)}, VALUES))
        saver.close()

    with killed(lambda: large(Stuck)):
        until(lambda: moto.list_multipart_uploads(Bucket="birds").get("Uploads"))
    assert elsewhere(tmp_path, storage.Bucket(bucket)).step == 5
    large()
    assert not moto.list_multipart_uploads(Bucket="birds").get("Uploads")
    found = elsewhere(tmp_path, storage.Bucket(bucket))
    assert found.step == 10 and same(found.read(), latest_state(folder).read())
