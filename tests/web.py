"""A real web server of a folder, S3 as moto imitates it, and an iopath handler of another scheme that writes."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
from iopath.common.file_io import PathHandler
from moto.server import ThreadedMotoServer


class _Files(SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "cut" not in self.path:
            return super().do_GET()
        self.send_response(200)  # and hang up before the end
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"only this")

    def log_message(self, *_: object) -> None: ...


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of the folder, and the paths that it was asked for so far."""
    handler = type("Files", (_Files,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def s3(bucket: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """A client of an S3 that holds an empty bucket, and the environment in which a process finds it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client("s3", "us-east-1", endpoint_url=address, **keys)
    client.create_bucket(Bucket=bucket)
    try:
        environment = {name.upper(): value for name, value in keys.items()}
        yield client, {**environment, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": address}
    finally:
        server.stop()


class Bucket(PathHandler):
    """`bucket://name` is a file in `folder`; it takes files whole, as object stores do, or not while `broken`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.broken = folder, False

    def _get_supported_prefixes(self) -> list[str]:
        return ["bucket://"]

    def _place(self, path: str) -> Path:
        if self.broken:
            raise ConnectionError("the bucket is out of reach")
        return self.folder / path.removeprefix("bucket://")

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        return open(self._place(path), mode)

    def _exists(self, path: str, **_: Any) -> bool:
        return self._place(path).exists()

    def _mkdirs(self, path: str, **_: Any) -> None:
        os.makedirs(self._place(path), exist_ok=True)

    def _rm(self, path: str, **_: Any) -> None:
        self._place(path).unlink()

    def _copy_from_local(self, local_path: str, dst_path: str, overwrite: bool = False, **_: Any) -> bool:
        shutil.copyfile(local_path, self._place(dst_path))
        return True
