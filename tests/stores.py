"""Stores for tests, written by tensorstore: OME-Zarr 0.4 and 0.5 with shards and levels."""

import http.server
import json
import random
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np

UM = 1e-3


def array(path: Path, data: np.ndarray, chunks=None, shards=None, version=3, names=None) -> Path:
    """Write one zarr array; `shards` are of version 3."""
    write(path, data.shape, data.dtype, chunks, shards, version, names).write(data).result()
    return path


def write(path, shape, dtype, chunks=None, shards=None, version=3, names=None):
    """Make an array that is all fill value, and open it."""
    import tensorstore as ts

    chunks, dtype = list(chunks or shape), np.dtype(dtype)
    if version == 2:
        metadata = {"chunks": chunks, "dtype": dtype.newbyteorder("<").str,
                    "dimension_separator": "/",
                    "compressor": {"id": "zstd", "level": 1}}  # fmt: skip
    else:
        inner = [{"name": "bytes", "configuration": {"endian": "little"}},
                 {"name": "zstd", "configuration": {"level": 1}}]  # fmt: skip
        sharded = [{
            "name": "sharding_indexed",
            "configuration": {"chunk_shape": chunks, "codecs": inner},
        }]  # fmt: skip
        grid = {"chunk_shape": list(shards or chunks)}
        metadata = {
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": grid},
            "codecs": sharded if shards else inner,
        }  # fmt: skip
        if names:
            metadata["dimension_names"] = list(names)
    spec = {
        "driver": "zarr" if version == 2 else "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": metadata | {"shape": list(shape)},
    }
    return ts.open(spec, create=True, delete_existing=True).result()


def ome(
    path: Path, levels: list[np.ndarray], axes="zyx", scale=(2.0, 0.5, 0.5), version="0.5",
    unit="micrometer", channels=(), orientation=None, chunks=8, shards=None, offset=None,
) -> Path:  # fmt: skip
    """Write an image with its levels, each half the size of the one before."""
    scale = [1.0] * (len(axes) - len(scale)) + list(scale)
    kinds = {"t": "time", "c": "channel"}
    named = [{"name": a, "type": kinds.get(a, "space")} for a in axes]
    for axis in named:
        if axis["type"] == "space" and unit:
            axis["unit"] = unit
        if orientation and axis["name"] in orientation:
            axis["orientation"] = {"type": "anatomical", "value": orientation[axis["name"]]}
    datasets = []
    for number, data in enumerate(levels):
        factor = [n / m for n, m in zip(levels[0].shape, data.shape, strict=True)]
        steps = [{"type": "scale", "scale": [s * f for s, f in zip(scale, factor, strict=True)]}]
        if offset:
            steps.append({"type": "translation", "translation": list(offset)})
        datasets.append({"path": f"s{number}", "coordinateTransformations": steps})
        sizes = [min(n, chunks) if a in "zyx" else 1 for a, n in zip(axes, data.shape, strict=True)]
        array(path / f"s{number}", data, sizes, shards, 2 if version == "0.4" else 3)
    held = {"multiscales": [{"axes": named, "datasets": datasets, "version": version}]}
    if channels:
        held["omero"] = {"channels": [{"label": name, "color": "00FF00"} for name in channels]}
    if version == "0.4":
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        (path / ".zattrs").write_text(json.dumps(held))
    else:
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": held}}
        (path / "zarr.json").write_text(json.dumps(group))
    return path


def terabyte(path: Path) -> Path:
    """Write an image of 8192^3 voxels that is all fill value, but for its coarse level of 128^3."""
    side, small = 8192, voxels(128, 128, 128)
    ome(path, [small, small], chunks=64)
    write(path / "s0", (side,) * 3, np.uint16, (64, 64, 64), (512, 512, 512))
    file = path / "zarr.json"
    held = json.loads(file.read_text())
    (step,) = held["attributes"]["ome"]["multiscales"][0]["datasets"][1][
        "coordinateTransformations"
    ]
    step["scale"] = [s * side / 128 for s in step["scale"]]
    file.write_text(json.dumps(held))
    return path


def halved(data: np.ndarray) -> np.ndarray:
    """Every other voxel along each spatial axis."""
    return data[..., ::2, ::2, ::2]


def voxels(*shape: int, seed: int = 0) -> np.ndarray:
    """Bright blob on a dark ground, uint16."""
    rng = np.random.default_rng(seed)
    data = rng.integers(90, 110, shape)
    inner = tuple(slice(n // 4, 3 * n // 4) for n in shape[-3:])
    data[(..., *inner)] += rng.integers(500, 1500, data[(..., *inner)].shape)
    return data.astype(np.uint16)


class Bucket:
    """The bucket `box` of an S3 server, moto's, that behaves as it is told; use it as a context.

    Attributes:
        mood: well, shaky (a third of the requests end in a 500 or a reset), short (chunks are cut),
            failing (500 for chunks), silent (chunks get no answer) or denied (403 without a key).
        latency_s: Before each answer.
        paths: What was asked for.
    """

    def __init__(self):
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_):
                pass

        self.mood, self.latency_s, self.paths = "well", 0.0, []
        self.random, self.closing = random.Random(0), threading.Event()
        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self.answer, True, request_handler=Quiet)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.put("box", b"")
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def put(self, name: str, content: bytes) -> None:
        """Write an object, `bucket/key`."""
        headers = {"Content-Type": "application/octet-stream", "x-amz-acl": "public-read"}
        url = f"{self.url}/{name}"
        asked = urllib.request.Request(url, data=content, method="PUT", headers=headers)
        urllib.request.urlopen(asked).close()

    def upload(self, folder: Path) -> None:
        """Write the files of a folder into the bucket."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"box/{file.relative_to(folder)}", file.read_bytes())

    def answer(self, environ, start):
        """Answer one request as the mood has it."""
        path, luck = environ["PATH_INFO"], self.random.random()
        get = environ["REQUEST_METHOD"] == "GET"
        time.sleep(self.latency_s)
        self.paths.append(path)
        chunk = "/s0/" in path and not path.endswith((".json", ".zarray", ".zattrs", ".zgroup"))
        if get and self.mood == "shaky" and luck < 0.15:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        if get and self.mood == "silent" and chunk:
            self.closing.wait(60)
        failing = (self.mood == "failing" and chunk) or (self.mood == "shaky" and luck < 0.3)
        denied = self.mood == "denied" and "HTTP_AUTHORIZATION" not in environ
        if get and (failing or denied):
            start("500 Internal Server Error" if failing else "403 Forbidden", [])
            return [b""]
        if not (get and self.mood == "short" and chunk):
            return self.app(environ, start)
        told = []
        body = b"".join(self.app(environ, lambda *args: told.append(args)))
        status, headers = told[0][:2]
        kept = [(k, v) for k, v in headers if k.lower() not in ("content-length", "content-range")]
        start(status, [*kept, ("Content-Length", str(len(body) // 2))])
        return [body[: len(body) // 2]]


class Web:
    """A folder as a web server that behaves as it is told; use it as a context.

    It knows what S3 is asked for objects, too, its folders being buckets.

    Args:
        folder: What it serves.

    Attributes:
        mood: well, shaky (a third of the requests end in a 503 or a reset), short (chunks are cut)
            or closed (403).
        latency_s: Before each answer.
        paths: What was asked for.
        most_at_once: Requests that were being answered at the same time, at most.
    """

    def __init__(self, folder: Path):
        self.mood, self.latency_s, self.paths = "well", 0.0, []
        self.random, web = random.Random(0), self
        self.at_once = self.most_at_once = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def log_message(self, *_):
                pass

            def do_GET(self):
                web.at_once += 1
                web.most_at_once = max(web.most_at_once, web.at_once)
                web.answer(self, folder)
                web.at_once -= 1

            do_HEAD = do_GET

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 128  # a burst of connections is not turned away for a second

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, request, folder: Path) -> None:
        """Answer one request, whole or by its range."""
        time.sleep(self.latency_s)
        self.paths.append(request.path)
        luck, file = self.random.random(), folder / request.path.lstrip("/")
        if self.mood == "shaky" and luck < 0.15:
            request.close_connection = True
            request.connection.close()
            return
        code = 403 if self.mood == "closed" else 503 if self.mood == "shaky" and luck < 0.3 else 200
        code = 404 if code == 200 and not file.is_file() else code
        size = file.stat().st_size if code == 200 else 0
        if self.mood == "short" and "/c/" in request.path:
            size //= 2
        start, stop, extra = 0, size, {"ETag": f'"{size}"'}
        request_range = request.headers.get("Range", "")
        if code == 200 and request_range.startswith("bytes="):
            first, _, last = request_range[6:].partition("-")
            start = int(first) if first else max(0, size - int(last))
            stop = min(int(last) + 1 if first and last else size, size)
            extra["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            code = 206
        body = b""
        if size:
            with open(file, "rb") as content:
                content.seek(start)
                body = content.read(stop - start)
        request.send_response(code)
        extra["Content-Length"] = str(len(body))
        for name, value in extra.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


def serve(folder: str, latency_s: float) -> None:
    """Be a web server in a process of one's own, until its input ends."""
    with Web(Path(folder)) as web:
        web.latency_s = latency_s
        print(web.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
