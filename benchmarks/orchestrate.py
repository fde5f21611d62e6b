"""What orchestration costs: seeing that nothing changed, walking stages that have nothing to do, adding a few images.

    python benchmarks/orchestrate.py [--count 100000] [--images 100000] [--side 64] [--rounds 3]
        [--only listing scan walk increment]

listing, scan: 100,000 keys of a bucket (a local server that answers ListObjectsV2 with pages made beforehand, so that
what is measured is ours), 100,000 unchanged files of a folder. walk: the flow beside `dvc repro`, alternately, in a
clone of this repository in which nothing is to be done. increment: 1% of images more, beside all of them at first, with
the autoencoder of the preset own-64.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

sys.path.insert(0, str(Path(__file__).parents[1]))

from dit import presets, storage
from dit.check import STAGES
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


def clone(folder: Path, *, preset: str, data: dict | None = None) -> Path:
    """A clone of this repository with a preset in it, and perhaps other images."""
    root = folder / "clone"
    run(["git", "clone", "-q", str(Path(__file__).parents[1]), str(root)], folder)
    presets.apply(str(root / preset), root / "params.yaml", root / "presets", overlay={"data": data} if data else None)
    run(["git", "add", "-A"], root)
    run(
        ["git", "-c", "user.name=b", "-c", "user.email=b@example.org", "commit", "-q", "--allow-empty", "-m", "b"], root
    )
    return root


def run(command: list[str], root: Path, **more: str) -> float:
    """Run a command and return its seconds."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    quiet = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "PATH": path}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=root, env={**environment, **quiet, **more}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started


def walk_seconds(rounds: int) -> tuple[list[float], list[float], int]:
    """Seconds of `dvc repro` and of the flow where nothing is to be done, taken alternately; and the number of stages."""
    repro, flow = [sys.executable, "-m", "dvc", "repro"], [sys.executable, "-m", "flows.train_dit"]
    with tempfile.TemporaryDirectory() as folder:
        root = clone(Path(folder), preset="tests/micro.yaml")
        ports = {"PREFECT_PORT": "4291", "MLFLOW_PORT": "5091"}
        try:
            run(repro, root)
            run(flow, root, **ports)  # all is in DVC's cache, and the server runs
            pairs = [(run(repro, root), run(flow, root, **ports)) for _ in range(rounds)]
        finally:
            run([sys.executable, "-m", "flows.local", "down"], root, **ports)
    return [a for a, _ in pairs], [b for _, b in pairs], len(STAGES)


def increment_seconds(count: int, side: int) -> tuple[float, float]:
    """Seconds that shard and encode work for `count` images of side x side pixels at first, and when 1% more have come, the
    autoencoder kept."""
    import numpy as np
    from PIL import Image

    def add(images: Path, numbers: range) -> None:
        for number in numbers:
            pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"class{number % CLASSES}" / f"{number:07d}.png")

    def work(root: Path) -> float:
        run([sys.executable, "-m", "dvc", "repro", "encode"], root)
        told = [
            json.loads((root / "scratch" / "outcome" / f"{stage}.json").read_text()) for stage in ("shard", "encode")
        ]
        return sum(each["seconds"] for each in told)

    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        for number in range(CLASSES):
            (images / f"class{number}").mkdir(parents=True)
        add(images, range(count))
        data = {"name": "many", "source": str(images), "image_size": side, "shard_images": 1000, "num_classes": CLASSES}
        root = clone(Path(folder), preset="presets/own-64.yaml", data=data)
        first = work(root)
        # As `retrain` does: fitted anew to the new images, another autoencoder would encode all of them anew.
        shutil.copytree(root / "artifacts" / "vae", Path(folder) / "vae")
        presets.override(root / "params.yaml", [f"vae.pretrained={Path(folder) / 'vae'}"])
        add(images, range(count, count + count // 100))
        return first, work(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="keys, and files")
    parser.add_argument("--images", type=int, default=100_000, help="of the increment")
    parser.add_argument("--side", type=int, default=64, help="of each of them, in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="of the walk")
    parts = ("listing", "scan", "walk", "increment")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    asked = parser.parse_args()
    if "listing" in asked.only:
        seconds = listing_seconds(asked.count)
        print(f"listing of {asked.count} keys over HTTP, each page confirmed: {seconds:.1f} s (aim: 15 s)", flush=True)
    if "scan" in asked.only:
        seconds = warm_scan_seconds(asked.count)
        print(f"scan of {asked.count} unchanged local files: {seconds:.1f} s (aim: 5 s)", flush=True)
    if "walk" in asked.only:
        repro, flow, stages = walk_seconds(asked.rounds)
        each = (statistics.median(flow) - statistics.median(repro)) / stages
        print(
            f"nothing to do, {stages} stages: dvc repro {statistics.median(repro):.1f} s ({min(repro):.1f} to "
            f"{max(repro):.1f}), the flow {statistics.median(flow):.1f} s ({min(flow):.1f} to {max(flow):.1f}): "
            f"{each:.2f} s a stage more (aim: 2 s)",
            flush=True,
        )
    if "increment" in asked.only:
        cold, more = increment_seconds(asked.images, asked.side)
        print(
            f"shard + encode of {asked.images} images of {asked.side} pixels: {cold:.1f} s; of 1% more: {more:.1f} s, "
            f"{more / cold:.1%} (aim: 5%)"
        )
