"""Shards: a fair and steady split, bytes that listing and settings decide alone, little work for little change."""

import hashlib
import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_sources import config, encoded, picture, put

from dit import files, shards, sources
from dit.paths import Paths
from dit.shards import SPLITS, held_out, load_split, plan, read_manifest, read_shard
from dit.sources import DataConfig, Listing, Row
from dit.stages.scan import scan
from dit.stages.shard import shard

# The split


@st.composite
def listings(draw, duplicates: bool = False) -> Listing:
    """Up to three generations of three classes; without duplicates every content is another."""
    rows = []
    for generation in range(draw(st.integers(1, 3))):
        labels = sorted(draw(st.lists(st.integers(0, 2), min_size=1, max_size=60)))
        for number, label in enumerate(labels):
            content = draw(st.integers(0, 9)) if duplicates else f"{generation}/{number}"
            sha256 = hashlib.sha256(f"{label}{content}".encode()).hexdigest()
            rows.append(Row(f"{generation}/{number}", 1, sha256, label, generation, number))
    return Listing("set", "folder", ["a", "b", "c"], rows)


fractions = st.floats(0, 0.9)
seeds = st.integers(0, 1000)


@given(listings(), fractions, seeds)
def test_each_class_of_each_block_gives_its_share(listing, fraction, seed):
    data = config(num_classes=3, held_out_fraction=fraction, split_seed=seed, shard_images=20)
    held = held_out(listing, data)
    sizes, taken = Counter(), Counter()
    for row in listing.rows:
        stratum = (row.generation, row.number // 20, row.label)
        sizes[stratum] += 1
        taken[stratum] += row.key in held
    assert all(abs(taken[stratum] - fraction * sizes[stratum]) < 1 for stratum in sizes)


@given(listings(duplicates=True), fractions, seeds, st.randoms())
def test_the_split_is_a_pure_function_of_the_set_of_rows(listing, fraction, seed, random):
    data = config(num_classes=3, held_out_fraction=fraction, split_seed=seed)
    shuffled = random.sample(listing.rows, len(listing.rows))
    assert held_out(listing, data) == held_out(listing._replace(rows=shuffled), data)


@given(listings(duplicates=True), fractions, seeds)
def test_copies_never_stand_on_both_sides(listing, fraction, seed):
    held = held_out(listing, config(num_classes=3, held_out_fraction=fraction, split_seed=seed, shard_images=20))
    sides = {(row.sha256, row.key in held) for row in listing.rows}
    assert len(sides) == len({row.sha256 for row in listing.rows})


@given(listings(duplicates=True), fractions, seeds)
def test_a_new_generation_or_class_moves_nobody(listing, fraction, seed):
    data = config(num_classes=3, held_out_fraction=fraction, split_seed=seed, shard_images=20)
    held = held_out(listing, data)
    last = max(row.generation for row in listing.rows)
    before = [row for row in listing.rows if row.generation < last]
    assert held_out(listing._replace(rows=before), data) == {row.key for row in before if row.key in held}
    relabelled = [row._replace(label=row.label + 1) for row in listing.rows]
    assert held_out(Listing("set", "folder", ["0", "a", "b", "c"], relabelled), data) == held


@given(listings(), st.integers(0, 10**6), seeds)
def test_a_removed_image_moves_nobody_in_another_block(listing, which, seed):
    data = config(num_classes=3, split_seed=seed, shard_images=20)
    gone = listing.rows[which % len(listing.rows)]
    before, after = (
        {block.file: block.rows for block in plan(listing._replace(rows=rows), data)}
        for rows in (listing.rows, [row for row in listing.rows if row is not gone])
    )
    changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    name = f"g{gone.generation:04d}-{gone.number // 20:05d}.tar"
    assert changed <= {f"train/{name}", f"heldout/{name}"}


def test_the_share_is_right_on_average_however_small_the_blocks():
    rows = [Row(str(n), 1, hashlib.sha256(b"%d" % n).hexdigest(), 0, 0, n) for n in range(4000)]
    listing = Listing("set", "none", [], rows)
    for seed in range(3):
        data = config(labels="none", num_classes=0, held_out_fraction=0.1, split_seed=seed, shard_images=4)
        assert abs(len(held_out(listing, data)) - 400) <= 4
    first, second = (held_out(listing, config(labels="none", num_classes=0, split_seed=seed)) for seed in (0, 1))
    assert len(first) == len(second) == 800 and len(first & second) < 300


def test_a_class_that_is_all_copies_is_trained_on():
    rows = [Row(str(n), 1, "one and the same", 0, 0, n) for n in range(9)]
    for seed in range(5):
        assert not held_out(Listing("set", "none", [], rows), config(labels="none", num_classes=0, split_seed=seed))


def test_a_listing_is_planned_in_blocks():
    rows = [Row(str(n), 1, f"{n:064x}", 0, n // 10, n % 10) for n in range(20)]
    data = config(labels="none", num_classes=0, held_out_fraction=0.0, shard_images=4)
    blocks = plan(Listing("set", "none", [], rows[::-1]), data)
    assert [block.file for block in blocks] == [f"train/g000{g}-0000{b}.tar" for g in (0, 1) for b in (0, 1, 2)]
    assert [len(block.rows) for block in blocks] == [4, 4, 2] * 2
    assert [row.number for block in blocks[:3] for row in block.rows] == list(range(10))


# The stage


class Project:
    """A source folder and the two stages over it, with DVC's part played: outs into the cache, deleted before a run."""

    def __init__(self, root: Path, source: Path | None = None, **settings):
        self.source, self.paths = source or root / "set", Paths(root / "project")
        self.data = config(**{"source": str(self.source), "num_classes": 2, "shard_images": 20, **settings})
        self.folder = self.paths.artifacts / "shard"

    def run(self) -> "Project":
        scan(self.data, paths=self.paths)
        shutil.rmtree(self.folder, ignore_errors=True)
        shard(self.data, paths=self.paths)
        for file in [file for file in self.folder.rglob("*") if file.is_file()]:
            md5 = hashlib.md5(file.read_bytes()).hexdigest()
            cached = self.paths.root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
            cached.parent.mkdir(parents=True, exist_ok=True)
            if not cached.exists():
                shutil.copyfile(file, cached)
                cached.chmod(0o444)
        return self

    def files(self) -> dict[str, bytes]:
        return {str(file.relative_to(self.folder)): file.read_bytes() for file in self.folder.rglob("*.*")}

    def tars(self) -> dict[str, bytes]:
        return {name: content for name, content in self.files().items() if name.endswith(".tar")}


def cold(project: Project, tmp_path: Path) -> dict[str, bytes]:
    """What a project without index and cache makes of the same listing."""
    fresh = Project(tmp_path / "cold", project.source)
    fresh.data = project.data
    (fresh.paths.artifacts / "scan").mkdir(parents=True)
    shutil.copy(project.paths.artifacts / "scan" / "listing.json", fresh.paths.artifacts / "scan")
    return fresh.run().files()


@pytest.fixture
def project(tmp_path) -> Project:
    """45 images: blocks of 20, 20 and 5, each with a train and a held-out shard."""
    project = Project(tmp_path)
    put(project.source, *[f"{'cat' if n < 25 else 'dog'}/{n:03d}.png" for n in range(45)])
    return project.run()


def built(capsys) -> tuple[int, int]:
    words = capsys.readouterr().out.strip().splitlines()[-1].replace(",", "").split()
    return int(words[words.index("built") - 1]), int(words[words.index("reused") - 1])


def test_manifest_and_shards_tell_the_truth(project):
    manifest = read_manifest(project.folder)
    assert manifest["classes"] == ["cat", "dog"] and manifest["image_size"] == 8
    listing = sources.read_listing(project.paths.artifacts / "scan" / "listing.json")
    by_place = {f"{row.generation:04d}-{row.number:08d}": row for row in listing.rows}
    seen = set()
    for entry in manifest["shards"]:
        content = (project.folder / entry["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
        samples = list(read_shard(project.folder / entry["file"]))
        assert np.bincount([label for _, label, _ in samples], minlength=2).tolist() == entry["class_counts"]
        assert len(samples) == entry["samples"] and entry["file"].startswith(entry["split"])
        for key, label, image in samples:
            row = by_place[key]
            assert label == row.label and key not in seen
            assert np.array_equal(
                image, np.asarray(sources.decode(project.data, files.read_content(project.data, row.key)))
            )
            seen.add(key)
    assert len(seen) == 45
    assert json.loads((project.folder / "quarantine.json").read_text()) == []


def test_splits_load_whole_and_as_a_stream(project):
    for split in SPLITS:
        images, labels = load_split(project.folder, split)
        stream = list(shards.stream_split(project.folder, split))
        assert (images.dtype, labels.dtype, images.shape[1:]) == (np.uint8, np.int64, (8, 8, 3))
        assert len(stream) == len(images) == len(labels)
        assert np.array_equal(images, np.stack([image for _, _, image in stream]))
        assert labels.tolist() == [label for _, label, _ in stream]
    assert len(load_split(project.folder, "train")[0]) + len(load_split(project.folder, "heldout")[0]) == 45


def test_webdataset_reads_them(project):
    import webdataset

    urls = [str(project.folder / entry["file"]) for entry in read_manifest(project.folder)["shards"]]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "cls", "json")
    samples = list(dataset)
    assert len(samples) == 45 and {label for _, _, label, _ in samples} == {0, 1}
    for _, image, label, origin in samples:
        assert image.mode == "RGB" and image.size == (8, 8)
        assert origin["key"].startswith(["cat", "dog"][label])


def test_they_are_the_bytes_that_webdataset_writes(project, tmp_path):
    import webdataset

    for name, content in project.tars().items():
        samples = shards._samples(project.folder / name)
        with webdataset.TarWriter(
            str(tmp_path / "its.tar"), user="dit", group="dit", mtime=0, compress=False, encoder=False
        ) as its:
            for key, sample in samples:
                its.write({"__key__": key, **sample})
        assert (tmp_path / "its.tar").read_bytes() == content


def test_a_run_from_nothing_makes_the_same_bytes(project, tmp_path):
    assert cold(project, tmp_path) == project.files()


def test_ten_more_images_cost_one_train_and_one_held_out_shard(project, tmp_path, capsys):
    before = project.tars()
    put(project.source, *[f"cat/new{n}.png" for n in range(10)])
    project.run()
    assert built(capsys) in [(1, len(before)), (2, len(before))]
    after = project.tars()
    new = after.keys() - before.keys()
    assert "train/g0001-00000.tar" in new and new <= {"train/g0001-00000.tar", "heldout/g0001-00000.tar"}
    assert {name: after[name] for name in before} == before
    assert project.files() == cold(project, tmp_path)


def test_nothing_new_builds_nothing(project, capsys):
    before = project.files()
    project.run()
    assert built(capsys) == (0, 6) and project.files() == before


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("number", [3, 24, 44])
def test_a_removed_or_replaced_image_leaves_no_trace(project, tmp_path, capsys, number, replace):
    victim = f"{'cat' if number < 25 else 'dog'}/{number:03d}.png"
    traces = [encoded(sources.decode(project.data, files.read_content(project.data, victim)))] + (
        [] if replace else [victim.encode()]
    )
    before = project.tars()
    assert all(any(trace in content for content in before.values()) for trace in traces)
    if replace:
        put(project.source, victim, content=encoded(picture(10**6)))
    else:
        (project.source / victim).unlink()
    project.run()
    after = project.tars()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed and {name.partition("/")[2] for name in changed} == {f"g0000-{number // 20:05d}.tar"}
    assert built(capsys)[0] == len(changed & after.keys())
    for content in project.files().values():
        assert not any(trace in content for trace in traces)
    assert project.files() == cold(project, tmp_path)


def test_a_class_added_in_between_changes_labels_but_not_the_split(project, tmp_path):
    held = {entry["file"]: entry["samples"] for entry in read_manifest(project.folder)["shards"]}
    put(project.source, *[f"cow/{n}.png" for n in range(20)])
    project.data = config(source=str(project.source), num_classes=3, shard_images=20)
    project.run()
    entries = read_manifest(project.folder)["shards"]
    assert {entry["file"]: entry["samples"] for entry in entries if "g0000" in entry["file"]} == held
    assert {len(entry["class_counts"]) for entry in entries} == {3}
    assert project.files() == cold(project, tmp_path)


def test_what_cannot_be_read_goes_to_quarantine(project, tmp_path):
    put(project.source, "cat/000.png", "dog/044.png", content=b"no picture")
    put(project.source, "cat/001.png", content=b"")
    project.data = config(source=str(project.source), num_classes=2, shard_images=20, max_bad_fraction=0.1)
    project.run()
    reason = "neither a PNG, nor a JPEG, nor a WebP image"
    assert json.loads((project.folder / "quarantine.json").read_text()) == [
        {"key": "cat/000.png", "reason": reason},
        {"key": "cat/001.png", "reason": "empty file"},
        {"key": "dog/044.png", "reason": reason},
    ]
    assert sum(entry["samples"] for entry in read_manifest(project.folder)["shards"]) == 42
    before = project.files()
    assert project.run().files() == before == cold(project, tmp_path)


def test_too_much_of_it_stops_the_stage_and_touches_nothing(project):
    before = project.files()
    put(project.source, "cat/000.png", "cat/001.png", "cat/002.png", "cat/003.png", content=b"no picture")
    scan(project.data, paths=project.paths)
    with pytest.raises(
        ValueError, match=r"data.max_bad_fraction: 4 of 45 .*'cat/000.png': neither .*'cat/002.png'"
    ) as e:
        shard(project.data, paths=project.paths)
    assert "cat/003.png" not in str(e.value) and "\n" not in str(e.value)
    assert project.files() == before
    file = project.paths.scratch / "quarantine.json"
    assert f"all of them are in {file})" in str(e.value)
    assert [bad["key"] for bad in json.loads(file.read_text())] == [f"cat/00{n}.png" for n in range(4)]
    project.data = replace(project.data, max_bad_fraction=0.1)
    project.run()
    assert not file.exists(), "what was repaired or accepted is not told of again"


def test_a_file_that_the_scan_could_not_read_is_quarantined(project):
    file = project.paths.artifacts / "scan" / "listing.json"
    listing = sources.read_listing(file)
    rows = [row._replace(sha256="" if row.number == 7 else row.sha256) for row in listing.rows]
    file.write_bytes(sources.format_listing(listing._replace(rows=rows)))
    shard(config(source=str(project.source), num_classes=2, shard_images=20, max_bad_fraction=0.1), paths=project.paths)
    (bad,) = json.loads((project.folder / "quarantine.json").read_text())
    assert bad["key"] == "cat/007.png" and "could not be read when the source was scanned" in bad["reason"]


@pytest.mark.parametrize("vanish", [False, True])
def test_an_image_that_changed_since_the_scan_is_refused(project, vanish):
    put(project.source, "dog/new.png")
    scan(project.data, paths=project.paths)
    before = project.files()
    if vanish:
        (project.source / "dog/new.png").unlink()
    else:
        put(project.source, "dog/new.png", content=encoded(picture(10**6)))
    with pytest.raises(ValueError, match="data.source: 'dog/new.png' changed since scan.*: run again"):
        shard(project.data, paths=project.paths)
    assert project.files() == before
    assert not list((project.paths.scratch / "publish").iterdir())


def test_a_listing_of_another_source_is_refused(project):
    with pytest.raises(ValueError, match="data.source: the listing is of .*: run the scan stage again"):
        shard(config(), paths=project.paths)


def test_nothing_to_train_on_is_refused(tmp_path):
    project = Project(tmp_path, labels="none", num_classes=0, held_out_fraction=0.999)
    put(project.source, "a.png")
    with pytest.raises(ValueError, match="data.held_out_fraction: no image is left to train on"):
        project.run()


def test_a_class_with_nothing_to_train_on_is_refused(tmp_path):
    project = Project(tmp_path, max_bad_fraction=0.5)
    put(project.source, *[f"cat/{n}.png" for n in range(9)])
    put(project.source, "dog/0.png", content=b"no picture")
    with pytest.raises(ValueError, match="data.source: 1 classes .'dog'. have no readable image left to train on"):
        project.run()


def test_what_a_stopped_run_has_built_is_not_built_again(project, capsys):
    put(project.source, *[f"dog/new{n:02d}.png" for n in range(50)])
    scan(project.data, paths=project.paths)
    late = max(plan(sources.read_listing(project.paths.artifacts / "scan" / "listing.json"), project.data)).rows[-1].key
    content = (project.source / late).read_bytes()
    put(project.source, late, content=b"for a moment")
    with pytest.raises(ValueError, match="changed since scan"):
        shard(project.data, paths=project.paths)
    put(project.source, late, content=content)
    shutil.rmtree(project.folder)
    capsys.readouterr()
    shard(project.data, paths=project.paths)
    new, reused = built(capsys)
    assert new < 6 and reused > 6
    assert not list((project.paths.scratch / "reuse" / "shard").iterdir())


def test_any_file_name_and_no_labels(tmp_path):
    project = Project(tmp_path, labels="none", num_classes=0, held_out_fraction=0.0)
    names = ["a.b.c.png", "ü/ñ x\n'.png", 'deep/er/"q".json.png', "漢字.JPG", "-.png", "a.png.png"]
    put(project.source, *names)
    project.run()
    (entry,) = read_manifest(project.folder)["shards"]
    assert entry["class_counts"] == [6] and entry["samples"] == 6
    import webdataset

    dataset = webdataset.WebDataset(str(project.folder / entry["file"]), shardshuffle=False).decode("pil")
    assert {sample["json"]["key"] for sample in dataset} == set(names)
    images, labels = load_split(project.folder, "train")
    assert len(images) == 6 and labels.tolist() == [0] * 6
    assert load_split(project.folder, "heldout")[0].shape == (0, 8, 8, 3)


def test_shards_carry_no_metadata_and_no_time(tmp_path):
    import tarfile

    project = Project(tmp_path, labels="none", num_classes=0, held_out_fraction=0.0)
    image = picture(1, (16, 16))
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    put(project.source, "a.jpg", content=encoded(image, "JPEG", exif=exif, icc_profile=b"profile", comment=b"secret"))
    project.run()
    (content,) = project.tars().values()
    assert not any(word in content for word in (b"where I live", b"profile", b"secret"))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar}
        names = tar.getnames()
    assert members == {(0, 0, 0, "dit", 0o444)}
    assert names == ["0000-00000000.cls", "0000-00000000.json", "0000-00000000.png"]


def test_the_digits_split_is_balanced():
    data = DataConfig("digits", "digits", "folder", 10, 32, False, 0.2, 0, 512, 0.0)
    rows = [
        Row(image.key, image.bytes, sources.content_hash(files.read_content(data, image.key)), image.label, 0, number)
        for number, image in enumerate(files.list_images(data).images)
    ]
    listing = Listing("digits", "folder", [str(digit) for digit in range(10)], rows)
    held = held_out(listing, data)
    sizes = Counter(row.label for row in rows)
    taken = Counter(row.label for row in rows if row.key in held)
    assert all(abs(taken[label] - 0.2 * sizes[label]) < 2.5 for label in range(10))


def test_the_digest_of_a_shard_knows_what_its_bytes_depend_on():
    rows = [Row("k", 1, "s", 0, 0, 0), Row("l", 1, "t", 1, 0, 1)]
    block = shards.Block("train", 0, 0, rows)
    first = shards.input_digest(block, config())
    assert first == shards.input_digest(block, config(split_seed=5, max_bad_fraction=0.5, name="other", num_classes=12))
    others = [[rows[0]], [rows[0], rows[1]._replace(label=0)], [rows[0]._replace(sha256="x"), rows[1]]]
    digests = {shards.input_digest(block._replace(rows=other), config()) for other in others}
    digests |= {first, shards.input_digest(block, config(image_size=9)), shards.input_digest(block, config(source="a"))}
    assert len(digests) == 6
