"""Labels files, and sources that do not fit their labels."""

import json

import pytest
from test_archives import write_parquet
from test_sources import config, put
from test_tars import write_tar

from dit import files
from dit.files import read_labels

TOLD = {"a.png": "cat", "x/b.png": "dog", "c.png": "cat"}


@pytest.mark.parametrize(
    "name, content",
    [
        ("l.csv", "file_name,label\n" + "".join(f"{key},{label}\n" for key, label in TOLD.items())),
        ("l.csv", "\ufeffclass,more,key\r\n" + "".join(f'"{label}",,"{key}"\r\n' for key, label in TOLD.items())),
        ("l.tsv", "path\tlabel\n" + "".join(f"{key}\t{label}\n" for key, label in TOLD.items())),
        ("l.jsonl", "".join(json.dumps({"file_name": key, "label": label}) + "\n" for key, label in TOLD.items())),
        ("l.json", json.dumps({"labels": list(TOLD.items())})),
        ("l.json", json.dumps(TOLD)),
    ],
)
def test_a_labels_file_of_any_kind(tmp_path, name, content):
    assert read_labels(name, content.encode()) == TOLD
    put(tmp_path, *TOLD)
    (tmp_path / name).write_text(content, encoding="utf-8")
    data = config(source=str(tmp_path), labels=name, num_classes=2)
    found = files.list_images(data, files.open_source(data))
    assert {image.key: found.classes[image.label] for image in found.images} == TOLD and found.others == 0


def test_classes_that_are_numbers_stand_in_their_order(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a.png", 10], ["b.png", 9], ["c.png", 1]]}))
    found = files.list_images(config(source=str(tmp_path), labels="dataset.json", num_classes=3))
    assert (found.classes, [image.label for image in found.images]) == (["1", "9", "10"], [2, 1, 0])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("l.csv", "file_name,label\na.png,cat\n", "names no class for 2 images .the first is 'c.png'."),
        ("l.csv", "a.png,cat\n", "is no labels file"),
        ("l.csv", "", "is no labels file"),
        ("l.csv", "key,label\na.png,x\na.png,y\n", "stands there twice"),
        ("l.json", "{", "is no labels file"),
        ("l.json", "3", "is no labels file"),
        ("l.jsonl", "3", "is no labels file"),
        ("absent.csv", None, "'absent.csv' of .* cannot be read"),
    ],
)
def test_a_labels_file_that_does_not_fit_is_refused(tmp_path, name, content, message):
    put(tmp_path, *TOLD)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^data.labels: .*{message}") as error:
        files.list_images(config(source=str(tmp_path), labels=name, num_classes=2))
    assert "\n" not in str(error.value)


def test_labels_of_two_kinds_are_refused(tmp_path):
    put(tmp_path, "cat/a.png")
    write_tar(tmp_path / "x.tar", {"a.png": b"x", "a.cls": b"1"})
    data = config(source=str(tmp_path), num_classes=2)
    with pytest.raises(ValueError, match="'x.tar/a.png' has a label of its archive's own, 'cat/a.png' has none"):
        files.list_images(data, files.open_source(data))


def test_classes_numbered_differently_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", [b"x", b"y"], [0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "b.parquet", [b"x", b"y"], [0, 1], ["dog", "cat"])
    data = config(source=str(tmp_path), num_classes=2)
    with pytest.raises(ValueError, match="class 'dog' is number 1 in one archive and 0 in 'b.parquet'"):
        files.list_images(data, files.open_source(data))


def test_a_name_that_is_both_an_archive_and_a_folder_is_refused(tmp_path):
    from dit.files import Files
    from dit.places import File

    class Odd:
        name, unsettled_ns, readers = "odd", 0, 1

        def files(self):
            return iter([File("a.tar", 1, 0, 0), File("a.tar/b.png", 1, 0, 0)])

    with pytest.raises(ValueError, match="'a.tar' is an archive, and the beginning of 'a.tar/b.png'"):
        Files(Odd(), "odd").look("none")


def test_a_folder_called_like_an_archive_is_a_folder(tmp_path):
    put(tmp_path, "a.tar/1.png", "b.zip/2.png")
    data = config(source=str(tmp_path), num_classes=2)
    source = files.open_source(data)
    found = files.list_images(data, source)
    assert found.classes == ["a.tar", "b.zip"]
    assert source.read("a.tar/1.png") == (tmp_path / "a.tar/1.png").read_bytes()
    assert files.open_source(config(source=str(tmp_path / "a.tar"))).look("none").images[0].key == "1.png"


def test_an_archive_that_cannot_be_read_in_pieces_is_named(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    data = config(source=str(tmp_path))
    with pytest.raises(ValueError, match="'a.tar.gz' cannot be read in pieces: make it a .tar or .zip"):
        files.list_images(data, files.open_source(data))
