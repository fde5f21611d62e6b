"""How long it takes to see that nothing changed: 100,000 keys of a bucket, 100,000 files of a folder.

    python benchmarks/orchestrate.py [--count 100000]

The bucket is a local server that answers ListObjectsV2 with pages made beforehand, so that what is measured is ours.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

sys.path.insert(0, str(Path(__file__).parents[1]))

from dit import storage
from dit.files import list_images, open_source
from dit.paths import Paths
from dit.sources import DataConfig
from dit.stages.scan import scan

PAGE_KEYS = 1000
CLASSES = 10


def key(number: int, count: int) -> str:
    return f"class{number * CLASSES // count}/{number:07d}.png"


def pages(count: int) -> list[bytes]:
    made = []
    for first in range(0, count, PAGE_KEYS):
        items = "".join(
            f"<Contents><Key>{key(number, count)}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
            f"<ETag>&quot;{number:032x}&quot;</ETag><Size>1234</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for number in range(first, min(first + PAGE_KEYS, count))
        )
        last = first + PAGE_KEYS >= count
        token = "" if last else f"<NextContinuationToken>{len(made) + 1}</NextContinuationToken>"
        head = f"<IsTruncated>{str(not last).lower()}</IsTruncated>{token}"
        made.append(f"<?xml version='1.0'?><ListBucketResult>{head}{items}</ListBucketResult>".encode())
    return made


@contextmanager
def bucket(count: int):
    made = pages(count)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            body = made[int(parse_qs(urlparse(self.path).query).get("continuation-token", ["0"])[0])]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *told):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told = {"AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "two", "AWS_EC2_METADATA_DISABLED": "true"}
    os.environ |= {**told, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
    yield
    server.shutdown()


def setting(source: str) -> DataConfig:
    return DataConfig("many", source, "folder", CLASSES, 32, False, 0.1, 0, 1000, 0.0)


def listing_seconds(count: int) -> float:
    with bucket(count):
        data = setting("s3://many")
        started = time.perf_counter()
        found = list_images(data, open_source(data, bucket=storage.Bucket))
        assert len(found.images) == count
        return time.perf_counter() - started


def warm_scan_seconds(count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "set"
        for number in range(CLASSES):
            (root / f"class{number}").mkdir(parents=True)
        for number in range(count):
            file = root / key(number, count)
            file.write_bytes(b"%d" % number)
            os.utime(file, (1e9, 1e9))
        data, paths = setting(str(root)), Paths(Path(folder))
        scan(data, paths=paths)
        started = time.perf_counter()
        scan(data, paths=paths)
        return time.perf_counter() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    count = parser.parse_args().count
    print(f"listing of {count} keys over HTTP, each page confirmed: {listing_seconds(count):.1f} s (aim: 15 s)")
    print(f"scan of {count} unchanged local files: {warm_scan_seconds(count):.1f} s (aim: 5 s)")
