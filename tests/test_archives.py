"""Archives: every kind gives the same images as the folder it was made of, is read once, and harms nobody."""

import io
import json
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_sources import config, encoded, picture, put
from test_tars import kind, write_tar

from dit import archives, sources
from dit.paths import Paths
from dit.places import Folder
from dit.stages.scan import scan
from dit.stages.shard import shard

PICTURES = {f"{name}/{n}.x.png": encoded(picture(n + 10 * len(name))) for name in ("cat", "horse") for n in range(4)}


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_parquet(path: Path, contents: list[bytes | None], labels: list | None = None, names: list[str] | None = None):
    """As `datasets` writes images: structs of bytes and path, and what the columns mean in the metadata."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"image": [content and {"bytes": content, "path": f"{n}.png"} for n, content in enumerate(contents)]}
    features = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = labels
        features["label"] = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value"}
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    kinds = {"image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])}
    arrays = {name: pyarrow.array(values, kinds.get(name)) for name, values in columns.items()}
    parquet.write_table(pyarrow.table(arrays).replace_schema_metadata(told), path, row_group_size=3)
    return path


def settle(root: Path) -> None:
    for file in root.rglob("*"):
        os.utime(file, (1e9, 1e9))


def look(tmp_path, source: Path, **changes):
    """Scan and shard: (key -> class name, hashes, images)."""
    paths, data = Paths(tmp_path / "work"), config(**{"source": str(source), "num_classes": 2, **changes})
    scan(data, paths=paths)
    listing = sources.read_listing(paths.artifacts / "scan" / "listing.json")
    shard(data, paths=paths)
    assert json.loads((paths.artifacts / "shard" / "quarantine.json").read_text()) == []
    named = {row.key: listing.classes[row.label] if listing.classes else "" for row in listing.rows}
    return named, sorted(row.sha256 for row in listing.rows)


HASHES = sorted(sources.content_hash(content) for content in PICTURES.values())


@pytest.mark.parametrize("how", ["tar", "zip", "stored", "dotted", "TAR"])
def test_an_archive_gives_the_images_and_classes_of_its_folder(tmp_path, how):
    members = {f"./{key}": content for key, content in PICTURES.items()} if how == "dotted" else dict(PICTURES)
    members |= {"cat/.hidden.png": b"x", "notes.md": b"x", "__MACOSX/cat/x.png": b"x"}
    (tmp_path / "set").mkdir()
    name = {"dotted": "a.tar", "TAR": "a.TAR"}.get(how, "a.zip" if how != "tar" else "a.tar")
    if name.endswith(".zip"):
        write_zip(tmp_path / "set" / name, members, zipfile.ZIP_STORED if how == "stored" else zipfile.ZIP_DEFLATED)
    else:
        write_tar(tmp_path / "set" / name, members)
    for source in (tmp_path / "set", tmp_path / "set" / name):
        named, hashes = look(tmp_path, source)
        assert named == {f"{name}/{key}": key.partition("/")[0] for key in PICTURES} and hashes == HASHES


def test_a_class_may_be_a_folder_of_archives_or_one_archive(tmp_path):
    flat = {name: {key[-7:]: c for key, c in PICTURES.items() if key.startswith(name)} for name in ("cat", "horse")}
    for number, name in enumerate(flat):
        (tmp_path / "one" / name).mkdir(parents=True)
        write_tar(tmp_path / "one" / name / f"{number}.tar", flat[name])
        write_zip(tmp_path / "one" / name / f"{number}.zip", {"x.png": encoded(picture(99 + number))})
        (tmp_path / "two").mkdir(exist_ok=True)
        write_tar(tmp_path / "two" / f"{name}.tar", flat[name])
    named, _ = look(tmp_path, tmp_path / "one")
    assert named["cat/0.tar/0.x.png"] == "cat" and named["horse/1.zip/x.png"] == "horse" and len(named) == 10
    named, hashes = look(tmp_path, tmp_path / "two")
    assert named["horse.tar/0.x.png"] == "horse" and hashes == HASHES


def test_shards_made_elsewhere_are_indexed_where_they_lie(tmp_path):
    members = {}
    for n, content in enumerate(PICTURES.values()):
        members |= {f"{n}.png": content, f"{n}.mask.png": b"not its image", f"{n}.cls": b"%d" % (2 + 8 * (n % 2))}
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "000.tar", members)
    named, hashes = look(tmp_path, tmp_path / "set")
    assert hashes == HASHES and {named["000.tar/0.png"], named["000.tar/1.png"]} == {"2", "10"}
    listing = sources.read_listing(tmp_path / "work" / "artifacts" / "scan" / "listing.json")
    assert listing.classes == ["2", "10"], "numbers by their size"


def test_our_own_shards_are_a_source(tmp_path):
    put(tmp_path / "set", *PICTURES)
    look(tmp_path, tmp_path / "set", held_out_fraction=0.0)
    paths = Paths(tmp_path / "work")
    again = config(source=str(paths.artifacts / "shard" / "train"), num_classes=2)
    scan(again, paths=Paths(tmp_path / "again"))
    assert len(sources.read_listing(tmp_path / "again" / "artifacts" / "scan" / "listing.json").rows) == 8


@pytest.mark.parametrize("labels", ["names", "texts", "numbers", "none"])
def test_parquet_as_hugging_face_writes_it(tmp_path, labels):
    (tmp_path / "set").mkdir()
    contents = list(PICTURES.values())
    numbers = [n % 2 for n in range(8)]
    told = {"names": (numbers, ["zebra", "ant"]), "numbers": (numbers, None), "none": (None, None)}
    column, names = told.get(labels, ([("zebra", "ant")[n] for n in numbers], None))
    write_parquet(tmp_path / "set" / "train-0.parquet", contents, column, names)
    changes = {"labels": "none", "num_classes": 0} if labels == "none" else {}
    named, hashes = look(tmp_path, tmp_path / "set", **changes)
    assert hashes == HASHES and list(named)[7] == "train-0.parquet/00000007.png"
    expected = {"numbers": ("0", "1"), "none": ("", "")}.get(labels, ("zebra", "ant"))
    assert (named["train-0.parquet/00000000.png"], named["train-0.parquet/00000001.png"]) == expected
    classes = sources.read_listing(tmp_path / "work" / "artifacts" / "scan" / "listing.json").classes
    assert labels != "names" or classes == ["zebra", "ant"], "numbered as there"


def test_an_unchanged_archive_is_not_read_again(tmp_path, monkeypatch, capsys):
    root = tmp_path / "set"
    root.mkdir()
    write_tar(root / "a.tar", PICTURES)
    write_zip(root / "b.zip", PICTURES)
    write_parquet(root / "c.parquet", list(PICTURES.values()))
    settle(root)
    data, paths = config(source=str(root), labels="none", num_classes=0), Paths(tmp_path)
    scan(data, paths=paths)
    read, plain = [], archives._of_kind
    monkeypatch.setattr(archives, "_of_kind", lambda place, file: read.append(file.name) or plain(place, file))
    scan(data, paths=paths)
    shard(data, paths=paths)
    assert not read and "0 new, 0 changed" in capsys.readouterr().out
    write_zip(root / "b.zip", {**PICTURES, "new.png": b"new"})
    scan(data, paths=paths)
    assert read == ["b.zip"] and "1 new, 0 changed, 0 gone" in capsys.readouterr().out


def index(path: Path) -> list[archives.Member]:
    place = Folder(str(path.parent))
    return archives.index(place, place.find(path.name), None)


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "C:x.png"])
@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_what_points_outside_is_refused(tmp_path, name, ending):
    path = tmp_path / f"x.{ending}"
    (write_tar if ending == "tar" else write_zip)(path, {"fine.png": b"x", name: b"x"})
    with pytest.raises(ValueError, match=f"^data.source: x.{ending}: .* names a place outside") as error:
        index(path)
    assert "\n" not in str(error.value)


def test_a_link_in_a_tar_is_refused(tmp_path):
    write_tar(tmp_path / "x.tar", {"x.png": kind(tarfile.SYMTYPE, linkname="/etc/passwd")})
    with pytest.raises(ValueError, match="x.tar: 'x.png' is a link"):
        index(tmp_path / "x.tar")


def test_bombs_are_refused_or_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_BYTES", 100_000)
    write_zip(tmp_path / "big.zip", {"x.png": bytes(200_000)})
    write_tar(tmp_path / "big.tar", {"x.png": bytes(200_000)})
    for name in ("big.zip", "big.tar"):
        with pytest.raises(ValueError, match=f"{name}: 'x.png' tells of 200000 bytes, and above 100000 none is read"):
            index(tmp_path / name)
    content = bytearray(write_zip(tmp_path / "forged.zip", {"x.png": bytes(200_000)}).read_bytes())
    for size in (content.index(b"PK\3\4") + 22, content.index(b"PK\1\2") + 24):
        content[size : size + 4] = struct.pack("<I", 9)  # it says 9 bytes, and holds 200,000
    (tmp_path / "forged.zip").write_bytes(content)
    (member,) = index(tmp_path / "forged.zip")
    assert member.sha256 == "", "unreadable, and no more than one byte too many was unpacked"
    monkeypatch.setattr(archives, "MOST_GROUP_BYTES", 100)
    with pytest.raises(ValueError, match="smaller row groups"):
        index(write_parquet(tmp_path / "x.parquet", list(PICTURES.values())))


def test_members_that_overlap_are_refused(tmp_path):
    content = bytearray(write_zip(tmp_path / "x.zip", {"a.png": b"a" * 50, "b.png": b"b" * 50}, 0).read_bytes())
    first = content.index(b"PK\1\2")
    second = content.index(b"PK\1\2", first + 4)
    content[second + 42 : second + 46] = struct.pack("<I", 10)  # into the first one's bytes
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ValueError, match="overlaps another, or is forged|torn, or not what its name says"):
        index(tmp_path / "x.zip")


@pytest.mark.parametrize("ending", ["tar", "zip", "parquet"])
def test_what_is_torn_or_of_another_kind_is_refused(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    write = {"tar": write_tar, "zip": write_zip, "parquet": lambda path, all: write_parquet(path, list(all.values()))}
    content = write[ending](path, PICTURES).read_bytes()
    for wrong in (content[: len(content) // 2], b"", b"hello" * 300):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"^data.source: x.{ending}.* is torn") as error:
            index(path)
        assert "\n" not in str(error.value)


def test_damage_inside_a_zip_is_quarantined_and_the_rest_used(tmp_path):
    content = bytearray(write_zip(tmp_path / "x.zip", PICTURES, zipfile.ZIP_STORED).read_bytes())
    content[content.index(PICTURES["cat/1.x.png"]) + 40] ^= 1
    (tmp_path / "x.zip").write_bytes(content)
    data, paths = config(source=str(tmp_path / "x.zip"), num_classes=2, max_bad_fraction=0.2), Paths(tmp_path)
    scan(data, paths=paths)
    shard(data, paths=paths)
    (bad,) = json.loads((paths.artifacts / "shard" / "quarantine.json").read_text())
    assert bad["key"] == "x.zip/cat/1.x.png"


def test_what_is_twice_in_an_archive_or_labelled_half_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for content in (b"1", b"2"):
            info = tarfile.TarInfo("a.png")
            info.size = 1
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match="x.tar holds 'a.png' twice: keep one"):
        index(tmp_path / "x.tar")
    write_tar(tmp_path / "x.tar", {"a.png": b"x", "a.cls": b"1", "b.png": b"y"})
    with pytest.raises(ValueError, match="b.png has no label"):
        index(tmp_path / "x.tar")
    with pytest.raises(ValueError, match="has the label -1, which no class has"):
        index(write_parquet(tmp_path / "x.parquet", [b"x"], [-1], ["a", "b"]))
