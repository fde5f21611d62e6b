"""S3: a real server for the good days, and one that fails in every way a network can."""

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse
from xml.sax.saxutils import escape

import pytest
from test_sources import config, encoded, picture

from dit import sources, storage
from dit.paths import Paths
from dit.places import Changed, OutOfReach
from dit.stages.scan import scan
from dit.stages.shard import shard
from dit.storage import Bucket

PICTURES = {f"{name}/{n}.png": encoded(picture(n + 10 * len(name))) for name in ("cat", "horse") for n in range(6)}


@dataclass
class Faulty:
    """A small S3: get, head, list and If-Match. `fault` says how a request goes wrong, by its count for that path."""

    objects: dict[str, bytes]
    fault: object = lambda path, count: ""
    page_keys: int = 5
    etags: bool = True  # MD5s, as S3's own; else names that say nothing, as of parts or of keys of one's own
    asked: Counter = field(default_factory=Counter)

    def etag(self, key: str) -> str:
        digest = hashlib.md5(self.objects[key]).hexdigest()
        return digest if self.etags else f"{digest[::-1]}-2"

    def listed(self, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        keys = sorted(key for key in self.objects if key.startswith(prefix))
        first = int(query.get("continuation-token", ["0"])[0])
        part = keys[first : first + self.page_keys]
        more = first + self.page_keys < len(keys)
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-02T03:04:05.678Z</LastModified>"
            f"<ETag>&quot;{self.etag(key)}&quot;</ETag><Size>{len(self.objects[key])}</Size></Contents>"
            for key in part
        )
        token = f"<NextContinuationToken>{first + self.page_keys}</NextContinuationToken>" if more else ""
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>'
            f"<KeyCount>{len(part)}</KeyCount>{token}{items}</ListBucketResult>"
        ).encode()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urlparse(request.path)
        key = unquote(url.path).removeprefix("/b").lstrip("/")
        name = key or "list"
        fault = self.fault(name, self.asked[name])
        self.asked[name] += 1
        if fault == "reset":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            raise ConnectionResetError
        if fault and fault.isdigit():
            return self.send(request, int(fault), b"<Error><Code>InternalError</Code></Error>", {})
        if key and key not in self.objects:
            return self.send(request, 404, b"<Error><Code>NoSuchKey</Code></Error>", {})
        body = self.objects[key] if key else self.listed(parse_qs(url.query))
        told, status = {}, 200
        if key:
            told = {"ETag": f'"{self.etag(key)}"', "Last-Modified": formatdate(1767323045, usegmt=True)}
            if request.headers.get("If-Match", told["ETag"]) != told["ETag"]:
                return self.send(request, 412, b"<Error><Code>PreconditionFailed</Code></Error>", {})
            if span := request.headers.get("Range"):
                start, end = span.removeprefix("bytes=").split("-")
                body, status = body[int(start) : int(end) + 1 if end else None], 206
        if fault == "corrupt":
            place = len(body) // 2 + self.asked[name]  # chance strikes elsewhere each time
            body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        self.send(request, status, body, told, fault)

    def accept(self, request: BaseHTTPRequestHandler) -> None:
        """Put or delete an object."""
        key = unquote(urlparse(request.path).path).removeprefix("/b").lstrip("/")
        fault = self.fault(key, self.asked[key])
        self.asked[key] += 1
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if fault == "reset":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            raise ConnectionResetError
        if fault and fault.isdigit():
            return self.send(request, int(fault), b"<Error><Code>InternalError</Code></Error>", {})
        if request.command == "DELETE":
            self.objects.pop(key, None)
            return self.send(request, 204, b"", {})
        if fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if base64.b64decode(request.headers["Content-MD5"]) != hashlib.md5(body).digest():
            return self.send(request, 400, b"<Error><Code>BadDigest</Code></Error>", {})
        self.objects[key] = body
        self.send(request, 200, b"", {"ETag": f'"{self.etag(key)}"'})

    def send(self, request, status: int, body: bytes, told: dict[str, str], fault: str = "") -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **told}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if fault == "cut":
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "slow":
            request.wfile.write(body[:3])
            request.wfile.flush()
            time.sleep(1.5)
        request.wfile.write(body)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        try:
            self.server.faulty.answer(self)
        except OSError:
            self.close_connection = True

    def do_PUT(self):
        try:
            self.server.faulty.accept(self)
        except OSError:
            self.close_connection = True

    do_HEAD, do_DELETE = do_GET, do_PUT

    def log_message(self, *told):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # more than there are readers: connections beyond it would be dropped in silence

    def handle_error(self, request, address):
        pass  # whoever asked has gone


@pytest.fixture
def credentials(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "one")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "two")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture
def faulty(credentials, monkeypatch):
    server = Server(("127.0.0.1", 0), Handler)
    server.faulty = Faulty(dict(PICTURES))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield server.faulty
    server.shutdown()
    server.server_close()


def made(tmp_path, source: str) -> dict[str, bytes]:
    """Scan and shard a source afresh: all files of the result."""
    paths = Paths(tmp_path)
    data = config(source=source, num_classes=2, shard_images=4)
    scan(data, paths=paths)
    shard(data, paths=paths)
    folder = paths.artifacts / "shard"
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="session")
def truth(tmp_path_factory):
    """What the same images make from a folder."""
    root = tmp_path_factory.mktemp("truth")
    for key, content in PICTURES.items():
        (root / "set" / key).parent.mkdir(parents=True, exist_ok=True)
        (root / "set" / key).write_bytes(content)
    return made(root, str(root / "set"))


@pytest.mark.parametrize(
    "fault, etags", [("", True), ("500", True), ("reset", True), ("cut", True), ("corrupt", True), ("corrupt", False)]
)
def test_whatever_goes_wrong_the_shards_are_those_of_a_folder(faulty, tmp_path, truth, fault, etags):
    faulty.etags = etags
    faulty.fault = lambda path, count: fault if count % 4 in ((0, 1) if etags else (1,)) else ""
    assert made(tmp_path, "s3://b") == truth
    assert not fault or max(faulty.asked.values()) > 2


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "corrupt"])
def test_archives_too(faulty, tmp_path, fault, monkeypatch):
    from test_archives import write_zip
    from test_tars import write_tar

    monkeypatch.setattr("dit.places.PIECE_BYTES", 700)
    content = {
        name: write(tmp_path / name, PICTURES).read_bytes()
        for name, write in (("a.tar", write_tar), ("b.zip", write_zip))
    }
    faulty.objects = content
    faulty.fault = lambda path, count: fault if count % 5 == 1 else ""
    paths, data = Paths(tmp_path), config(source="s3://b", num_classes=2, shard_images=4)
    scan(data, paths=paths)
    shard(data, paths=paths)
    rows = sources.read_listing(paths.artifacts / "scan" / "listing.json").rows
    truth = {f"{name}/{key}": sources.content_hash(c) for name in content for key, c in PICTURES.items()}
    assert {row.key: row.sha256 for row in rows} == truth
    assert json.loads((paths.artifacts / "shard" / "quarantine.json").read_text()) == []
    before = Counter(faulty.asked)
    scan(data, paths=paths)
    assert set(faulty.asked - before) == {"list"}, "unchanged archives are not read again"


def test_what_stalls_is_asked_for_again(faulty, tmp_path, truth, monkeypatch):
    from botocore.config import Config

    monkeypatch.setattr("botocore.config.Config", lambda **told: Config(**{**told, "read_timeout": 0.3}))
    faulty.fault = lambda path, count: "slow" if path in ("cat/3.png", "list") and count == 0 else ""
    assert made(tmp_path, "s3://b") == truth
    # Slow, again, and once for the shard; on a busy machine any other answer may come too late as well.
    assert faulty.asked["cat/3.png"] >= 3


@pytest.mark.parametrize("fault", ["500", "reset", "cut"])
def test_a_server_that_stays_ill_stops_the_scan_and_loses_nothing(faulty, tmp_path, truth, fault, monkeypatch):
    monkeypatch.setattr(storage, "READERS", 1)
    monkeypatch.setattr(Bucket, "readers", 1)
    faulty.fault = lambda path, count: fault if path == "horse/2.png" else ""
    paths, data = Paths(tmp_path), config(source="s3://b", num_classes=2, shard_images=4)
    with pytest.raises(
        OutOfReach, match="s3://b/horse/2.png could not be read from http://127.* in 6 attempts"
    ) as told:
        scan(data, paths=paths)
    assert "\n" not in str(told.value) and not (paths.artifacts / "scan" / "listing.json").exists()
    before, faulty.fault = Counter(faulty.asked), lambda path, count: ""
    scan(data, paths=paths)
    again = faulty.asked - before
    assert again["horse/2.png"] == 1 and not any(again[f"cat/{n}.png"] for n in range(6)), "known ones are kept"
    shard(data, paths=paths)
    folder = paths.artifacts / "shard"
    assert all((folder / name).read_bytes() == content for name, content in truth.items())


def test_a_shard_is_never_made_of_damaged_bytes(faulty, tmp_path):
    """Where no checksum helps (a part of an archive, say), the listing's hash still decides."""
    paths, data = Paths(tmp_path), config(source="s3://b", num_classes=2, shard_images=4)
    faulty.etags = False
    scan(data, paths=paths)
    faulty.objects = {key: content[:-1] + b"?" for key, content in faulty.objects.items()}  # as from a bad disk
    with pytest.raises(ValueError, match="changed since scan"):
        shard(data, paths=paths)
    assert not (paths.artifacts / "shard").exists()


def test_a_killed_scan_goes_on_where_it_stopped(faulty, tmp_path):
    """SIGKILL in the midst of the first download: what has come is not fetched again."""
    faulty.objects = {f"cat/{n:03d}.png": b"%d" % n for n in range(300)} | {"dog/1.png": b"x"}
    faulty.page_keys = 1000
    stuck = threading.Event()
    faulty.fault = lambda path, count: (stuck.set() or "slow") if path == "cat/250.png" and count == 0 else ""
    code = """
import sys
from pathlib import Path
from test_sources import config
from dit.paths import Paths
from dit.stages import scan as stage
stage.SAVE_SECONDS = 0.0
stage.scan(config(source="s3://b", num_classes=2), paths=Paths(Path(sys.argv[1])))"""
    folders = os.pathsep.join([os.getcwd(), os.path.dirname(__file__)])
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], env={**os.environ, "PYTHONPATH": folders})
    assert stuck.wait(60)
    journal = tmp_path / "scratch" / "scan"
    until = time.monotonic() + 20
    while not any(file.stat().st_size > 5000 for file in journal.glob("*.journal")) and time.monotonic() < until:
        time.sleep(0.01)
    child.kill()
    child.wait()
    before = Counter(faulty.asked)
    scan(config(source="s3://b", num_classes=2), paths=Paths(tmp_path))
    again = faulty.asked - before
    assert sum(again.values()) < 280 and not again["cat/000.png"]
    rows = sources.read_listing(tmp_path / "artifacts" / "scan" / "listing.json").rows
    assert {row.key: row.sha256 for row in rows} == {
        key: sources.content_hash(content) for key, content in faulty.objects.items()
    }


def test_a_piece_is_of_the_version_that_was_listed(faulty):
    place = Bucket("s3://b")
    (first,) = [file for file in place.files() if file.name == "cat/1.png"]
    assert place.find("cat/1.png") == first
    assert place.find("cat/none.png") is None
    assert place.read("cat/1.png", 3, 5, version=first.identity) == PICTURES["cat/1.png"][3:8]
    faulty.objects["cat/1.png"] = b"another"
    with pytest.raises(Changed):
        place.read("cat/1.png", 3, 5, version=first.identity)


def test_an_object_that_changes_while_scanned_is_not_remembered_wrongly(faulty, tmp_path):
    paths, data = Paths(tmp_path), config(source="s3://b", num_classes=2)
    listed = faulty.listed

    def change(query):
        page = listed(query)
        if "cat/1.png" in page.decode():
            page = page.replace(faulty.etag("cat/1.png").encode(), b"0" * 32)
        return page

    faulty.listed = change
    scan(data, paths=paths)
    faulty.listed = listed
    scan(data, paths=paths)
    assert faulty.asked["cat/1.png"] == 3, "refused, then as it is, then remembered under its own ETag"
    assert faulty.asked["cat/2.png"] == 1


@pytest.mark.parametrize(
    "status, code, told",
    [
        (404, "NoSuchBucket", "there is no bucket 'b': correct the name or AWS_ENDPOINT_URL"),
        (403, "AccessDenied", "no permission: grant s3:ListBucket and s3:GetObject"),
        (403, "InvalidAccessKeyId", "the credentials were refused .InvalidAccessKeyId.: set AWS_ACCESS_KEY_ID"),
        (403, "ExpiredToken", "the credentials were refused"),
        (400, "SomethingElse", "SomethingElse"),
    ],
)
def test_what_a_person_can_mend_is_said_in_one_line_at_once(faulty, tmp_path, status, code, told):
    def refuse(request):
        faulty.asked["all"] += 1
        faulty.send(request, status, f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode(), {})

    faulty.answer = refuse
    with pytest.raises(ValueError, match=f"^data.source: 's3://b': .*{told}") as error:
        scan(config(source="s3://b"), paths=Paths(tmp_path))
    assert "\n" not in str(error.value) and faulty.asked["all"] <= 3


def test_no_credentials_and_no_endpoint_are_said_in_one_line(faulty, tmp_path, monkeypatch):
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mine.getsockname()[1]}")
        with pytest.raises(OutOfReach, match="is AWS_ENDPOINT_URL right"):
            list(Bucket("s3://b").files())
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ValueError, match="there are no credentials: set AWS_ACCESS_KEY_ID and"):
        list(Bucket("s3://b").files())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no url")
    with pytest.raises(ValueError, match="correct the AWS settings"):
        list(Bucket("s3://b").files())
    with pytest.raises(ValueError, match="names no bucket"):
        Bucket("s3://")


@pytest.mark.parametrize("fault", ["", "500", "503", "reset", "corrupt"])
def test_what_is_put_there_is_there_whole_or_not_at_all(faulty, tmp_path, fault):
    (tmp_path / "state").write_bytes(content := bytes(range(256)) * 50)
    faulty.fault = lambda path, count: fault if count < 2 else ""
    place = Bucket("s3://b/states", "run.mirror")
    place.put("step/one", tmp_path / "state")
    assert faulty.objects["states/step/one"] == content and place.read("step/one") == content
    assert faulty.asked["states/step/one"] >= (3 if fault else 1)
    (tmp_path / "state").write_bytes(b"newer")
    place.put("step/one", tmp_path / "state")
    assert place.read("step/one") == b"newer"
    place.delete("step/one")
    place.delete("step/one")
    assert place.find("step/one") is None


def test_what_can_not_be_put_is_said_in_one_line_with_its_setting(faulty, tmp_path):
    (tmp_path / "state").write_bytes(b"state")
    place = Bucket("s3://b", "run.mirror")
    faulty.fault = lambda path, count: "corrupt"
    with pytest.raises(OutOfReach, match=r"^run.mirror: s3://b/one could not be written to http://127.* in 6 attempts"):
        place.put("one", tmp_path / "state")
    faulty.accept = lambda request: faulty.send(request, 403, b"<Error><Code>AccessDenied</Code></Error>", {})
    with pytest.raises(ValueError, match="^run.mirror: s3://b/one: no permission: grant s3:PutObject, s3:DeleteObj"):
        place.put("one", tmp_path / "state")
    with pytest.raises(FileNotFoundError):
        place.put("one", tmp_path / "none")
    assert "one" not in faulty.objects


# A server that others wrote


@pytest.fixture
def moto(credentials, monkeypatch):
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="birds")
    client.create_bucket(Bucket="archives")
    yield client
    server.stop()


def test_a_bucket_of_a_real_server_from_first_look_to_new_images(moto, tmp_path, truth, monkeypatch, capsys):
    for key, content in PICTURES.items():
        moto.put_object(Bucket="birds", Key=f"some/set/{key}", Body=content)
    moto.put_object(Bucket="birds", Key="some/set/.hidden/x.png", Body=b"x")
    moto.put_object(Bucket="birds", Key="some/setting/x.png", Body=b"x")
    assert made(tmp_path, "s3://birds/some/set/") == truth

    read, plain = [], Bucket.read
    monkeypatch.setattr(Bucket, "read", lambda self, file, *a, **k: read.append(file) or plain(self, file, *a, **k))
    paths, data = Paths(tmp_path), config(source="s3://birds/some/set/", num_classes=2, shard_images=4)
    scan(data, paths=paths)
    assert not read, "an unchanged bucket is listed, and nothing fetched"
    moto.put_object(Bucket="birds", Key="some/set/cat/new ü+&.png", Body=PICTURES["cat/0.png"] + b"\0")
    moto.put_object(Bucket="birds", Key="some/set/cat/1.png", Body=PICTURES["cat/2.png"])
    moto.delete_object(Bucket="birds", Key="some/set/horse/1.png")
    capsys.readouterr()
    scan(data, paths=paths)
    assert sorted(read) == ["cat/1.png", "cat/new ü+&.png"]
    assert "1 new, 1 changed, 1 gone" in capsys.readouterr().out
    shard(data, paths=paths)
    keys = json.loads((paths.artifacts / "shard" / "manifest.json").read_text())["shards"]
    assert sum(entry["samples"] for entry in keys) == 12


def test_archives_and_labels_in_a_bucket(moto, tmp_path):
    from test_archives import write_zip

    write_zip(tmp_path / "a.zip", {f"in/{key}": content for key, content in PICTURES.items()})
    moto.upload_file(str(tmp_path / "a.zip"), "archives", "a.zip")
    lines = "".join(f"a.zip/in/{key},{key.partition('/')[0]}\n" for key in PICTURES)
    moto.put_object(Bucket="archives", Key="labels.csv", Body=f"file_name,label\n{lines}".encode())
    for source, labels in (("s3://archives", "labels.csv"), ("s3://archives/a.zip", "none")):
        paths = Paths(tmp_path / labels)
        data = config(source=source, labels=labels, num_classes=2 * (labels != "none"), shard_images=4)
        scan(data, paths=paths)
        shard(data, paths=paths)
        rows = sources.read_listing(paths.artifacts / "scan" / "listing.json").rows
        assert {row.sha256 for row in rows} == {sources.content_hash(content) for content in PICTURES.values()}
    with pytest.raises(ValueError, match="'none.tar' is not there|none.tar' is not there"):
        scan(config(source="s3://archives/none.tar"), paths=Paths(tmp_path))
    with pytest.raises(ValueError, match="there is no bucket 'absent'"):
        scan(config(source="s3://absent/x"), paths=Paths(tmp_path))


def test_large_files_go_in_parts_and_what_was_left_of_some_is_let_go_of(moto, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PART_BYTES", 5 * 2**20)  # the least that S3 takes
    content = os.urandom(12 * 2**20)
    (tmp_path / "large").write_bytes(content)
    place = Bucket("s3://birds/states", "run.mirror")
    place.put("large", tmp_path / "large")
    assert moto.get_object(Bucket="birds", Key="states/large")["Body"].read() == content
    begun = moto.create_multipart_upload(Bucket="birds", Key="states/half")
    moto.upload_part(Bucket="birds", Key="states/half", UploadId=begun["UploadId"], PartNumber=1, Body=content)
    others = moto.create_multipart_upload(Bucket="birds", Key="others/half")
    place.forget_unfinished()
    left = moto.list_multipart_uploads(Bucket="birds").get("Uploads", [])
    assert [upload["UploadId"] for upload in left] == [others["UploadId"]]
    assert [file.name for file in place.files()] == ["large"]
