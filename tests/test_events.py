"""flows/events.py, flows/probe.py and `dit notify` against a real Prefect server (its test harness)."""

import json
from types import SimpleNamespace

import pytest
from waiting import until

from dit import cli
from dit.paths import Paths, write_json
from dit.sources import DataConfig
from flows import events, probe

DATA = {
    "name": "photos", "source": "images", "labels": "folder", "num_classes": 2, "image_size": 32, "mirror": True,
    "held_out_fraction": 0.2, "split_seed": 0, "shard_images": 512, "max_bad_fraction": 0.01,
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with params.yaml and two images."""
    for name in ("cat/1.png", "dog/1.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).write_bytes(b"no reader will open this")
    (tmp_path / "params.yaml").write_text(json.dumps({"data": DATA}))  # JSON is YAML
    monkeypatch.chdir(tmp_path)
    return tmp_path


def received(name, resource):
    """The payloads of the events of this name and resource that the server has, the oldest first."""
    from prefect.client.orchestration import get_client

    wanted = {"filter": {"event": {"name": [name]}, "resource": {"id": [resource]}, "order": "ASC"}}
    with get_client(sync_client=True) as client:
        told = client.request("POST", "/events/filter", json=wanted).raise_for_status().json()
    return [event["payload"] for event in told["events"]]


@pytest.mark.slow
def test_notify_reaches_the_server_and_says_what_will_come_of_it(server, checkout, capsys):
    assert cli.main(["notify", "--dataset", "nobody"]) == 0
    said = capsys.readouterr().out
    assert (
        said == "sent: nobody changed; nothing will come of it: there is no deployment retrain/nobody (`dit deploy`)\n"
    )
    until(lambda: received("dit.data.changed", "dit.dataset.nobody") == [{}])


@pytest.mark.slow
def test_the_probe_tells_once_of_each_change(server, checkout, capsys):
    def asked():
        assert cli.main(["notify", "--if-changed"]) == 0
        return capsys.readouterr().out.partition(";")[0].strip()

    assert asked() == "sent: photos changed, 2 files"
    assert asked() == "photos: 2 files, unchanged"
    (checkout / "images" / "notes.txt").write_text("no image")
    assert asked() == "photos: 2 files, unchanged"
    (checkout / "images" / "dog" / "2.png").write_bytes(b"new")
    assert asked() == "sent: photos changed, 3 files"
    (checkout / "images" / "dog" / "2.png").write_bytes(b"NEW and longer")
    assert asked() == "sent: photos changed, 3 files"
    (checkout / "images" / "dog" / "2.png").unlink()
    assert asked() == "sent: photos changed, 2 files"
    until(lambda: [told["files"] for told in received("dit.data.changed", "dit.dataset.photos")] == [2, 3, 3, 2])


@pytest.mark.slow
def test_what_nobody_heard_is_told_again(server, checkout, monkeypatch):
    def refused(*told):
        raise ValueError("no server")

    with monkeypatch.context() as patch:
        patch.setattr(events, "send", refused)
        with pytest.raises(ValueError, match="no server"):
            events.notify(Paths(), if_changed=True)
    assert events.notify(Paths(), if_changed=True).startswith("sent: photos changed")


def test_without_a_server_one_line_tells_the_way_out(checkout, capsys):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert cli.main(["notify"]) == 2
        told = capsys.readouterr().err
        assert (
            told.startswith("dit: Prefect's server at http://127.0.0.1:9/api took no event") and told.count("\n") == 1
        )
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert cli.main(["notify"]) == 2
        assert "start one with `dit up`" in capsys.readouterr().err
        assert events.emit(events.RUN_PROGRESS, events.run("1")) is False


@pytest.mark.parametrize(
    ("arguments", "params", "line"),
    [
        (["--dataset", "others", "--if-changed"], DATA, "--if-changed looks at params.yaml's data.source, which is of"),
        (["--if-changed"], {**DATA, "source": "nowhere"}, "data.source: the folder 'nowhere' is not there"),
        ([], {**DATA, "nmae": "x"}, "data.nmae: no such setting (did you mean data.name?)"),
    ],
)
def test_bad_input_is_one_line(checkout, capsys, arguments, params, line):
    (checkout / "params.yaml").write_text(json.dumps({"data": params}))
    assert cli.main(["notify", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"dit: {line}") and told.count("\n") == 1


def test_a_glance_reads_a_bucket_s_listing_alone(checkout, monkeypatch):
    from dit import storage

    listed = [SimpleNamespace(name="cat/1.png", stamp=(3, 5, "etag")), SimpleNamespace(name="x.csv", stamp=(1, 1, "a"))]
    monkeypatch.setattr(storage, "Bucket", lambda url: SimpleNamespace(name=url, files=lambda: iter(listed)))
    data = DataConfig(**{**DATA, "source": "s3://bucket/photos", "labels": "x.csv"})
    seen = probe.look(data, Paths())
    assert seen.files == 2  # with the labels file, whose change is one of the data
    listed.reverse()
    assert probe.look(data, Paths()) == seen
    listed[0].stamp = (1, 1, "b")
    assert probe.look(data, Paths()) != seen


def test_the_embedded_digits_never_change():
    data = DataConfig(**{**DATA, "source": "digits", "num_classes": 10})
    assert probe.look(data, Paths()) == probe.look(data, Paths()) and probe.look(data, Paths()).files == 1797


@pytest.mark.slow
def test_a_champion_is_told_of_once(server, tmp_path):
    paths, file = Paths(tmp_path), tmp_path / "artifacts" / "register" / "model.json"
    assert not events.tell_champion(paths)
    model = {"name": "dit-photos", "version": 1, "alias": "champion", "decision": "champion", "digest": "a"}
    model |= {"metric": "fid", "value": 7.5, "reasons": ["There was no champion."], "champion_version": None}
    write_json(file, model)
    assert events.tell_champion(paths) and not events.tell_champion(paths)
    write_json(file, {**model, "version": 2, "alias": "challenger", "decision": "challenger"})
    assert not events.tell_champion(paths)
    write_json(file, {**model, "version": 3, "champion_version": 1, "champion_value": 7.5, "value": 7.0})
    assert events.tell_champion(paths) and not events.tell_champion(paths)
    told = until(lambda: (found := received("dit.model.champion", "dit.model.dit-photos"))[1:] and found)
    assert [(one["version"], one["before"], one["value"]) for one in told] == [(1, None, 7.5), (3, 1, 7.0)]
