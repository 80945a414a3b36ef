"""Remote storage for tests: web servers, also one like the Hugging Face Hub, moto's S3, and a writable handler."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
from iopath.common.file_io import PathHandler
from moto.server import ThreadedMotoServer


class _RequestHandler(SimpleHTTPRequestHandler):
    requested: list[str]

    def do_GET(self) -> None:
        self.requested.append(self.path)
        if "cut" not in self.path:
            return super().do_GET()
        self.send_response(200)  # announce 1000 bytes, and close the connection before the end
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"only this")

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serve_folder(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder over HTTP; yield the address and the list of paths requested so far."""
    handler = type("RequestHandler", (_RequestHandler,), {"requested": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.requested
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _HubHandler(BaseHTTPRequestHandler):
    folder: Path

    def do_HEAD(self) -> None:
        self._send(with_body=False)

    def do_GET(self) -> None:
        self._send(with_body=True)

    def _send(self, with_body: bool) -> None:
        repository, _, rest = self.path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        file = self.folder / repository / name
        self.send_response(200 if file.is_file() else 404 if (self.folder / repository).is_dir() else 401)
        self.send_header("X-Repo-Commit", hashlib.sha1(revision.encode()).hexdigest())
        data = file.read_bytes() if file.is_file() else b""
        self.send_header("Content-Length", str(len(data)))
        if file.is_file():
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        else:
            has_repository = (self.folder / repository).is_dir()
            self.send_header("X-Error-Code", "EntryNotFound" if has_repository else "RepoNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serve_hub(folder: Path) -> Iterator[str]:
    """Serve files like the Hugging Face Hub, from `folder/organisation/name/file`; yield the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (_HubHandler,), {"folder": folder}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve_s3(bucket: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Start an S3 server with an empty bucket; yield a client and the environment variables that name the server."""
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
    """`bucket://name` is a file in `folder`, written in one piece as in object stores. While `broken`, access fails."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.broken = folder, False

    def _get_supported_prefixes(self) -> list[str]:
        return ["bucket://"]

    def _file(self, path: str) -> Path:
        if self.broken:
            raise ConnectionError("the bucket is unreachable")
        return self.folder / path.removeprefix("bucket://")

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        return open(self._file(path), mode)

    def _exists(self, path: str, **_: Any) -> bool:
        return self._file(path).exists()

    def _mkdirs(self, path: str, **_: Any) -> None:
        os.makedirs(self._file(path), exist_ok=True)

    def _rm(self, path: str, **_: Any) -> None:
        self._file(path).unlink()

    def _copy_from_local(self, local_path: str, dst_path: str, overwrite: bool = False, **_: Any) -> bool:
        shutil.copyfile(local_path, self._file(dst_path))
        return True
