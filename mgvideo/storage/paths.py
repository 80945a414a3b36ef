"""Paths that may be URLs: read them, or fetch a local copy, through iopath.

`http://`, `https://` and `ftp://` can be read; `s3://` can be read and written if boto3 is installed; `hf://` (the
Hugging Face Hub) can be read if huggingface_hub is installed; `file://` is a local path. `register_handler` adds other
schemes. The handlers are process-wide state: one PathManager, `_manager`, and `_handlers`, which it uses, by prefix.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote
from urllib.request import Request, urlopen

from iopath.common.file_io import PathHandler, PathManager

from mgvideo.errors import UserError

from .members import file_on_disk, parse_member
from .remote_cache import fetch_once

SERVER_TIMEOUT_S = 20.0  # for a server to accept a connection or to send its next bytes
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
HUB_WEIGHTS = "model.safetensors"  # the file that hf://org/name stands for
_HUB_PATH = re.compile(r"(hf://([^/@]+/[^/@]+)(?:@([^/]+))?)(?:/(.+))?")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_handlers: dict[str, Any] = {}  # by prefix
_manager = PathManager()
logging.getLogger("iopath").addHandler(logging.NullHandler())  # it also raises each error that it logs


def register_handler(handler: PathHandler) -> None:
    """Add an iopath handler for its schemes. An output_dir requires a handler that can write."""
    _manager.register_handler(handler)
    _handlers.update(dict.fromkeys(handler._get_supported_prefixes(), handler))


def strip_file_scheme(path: str) -> str:
    """Return a path without a leading `file://`, its percent-encoding decoded; other paths are unchanged."""
    return unquote(re.sub(r"^file://(localhost)?", "", path)) if path.startswith("file://") else path


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL other than `file://`."""
    return _SCHEME.match(strip_file_scheme(os.fspath(path))) is not None


def join(root: str, path: str) -> str:
    """Join a root and a path; an absolute path or a URL is returned unchanged."""
    path = strip_file_scheme(path)
    return path if is_remote(path) else os.path.join(strip_file_scheme(root), path)


def relative(path: str, root: str) -> str:
    """Return the path for which `join(root, …)` gives `path`; a URL that is not under the root is unchanged."""
    if not is_remote(path):
        return path if is_remote(root) else os.path.relpath(path, strip_file_scheme(root))
    return path.removeprefix(f"{root.rstrip('/')}/")


def require_local_path(key: str, path: str) -> str:
    """Return the local path to which a config key writes. Raises UserError for a URL."""
    if is_remote(path):
        raise UserError(f"{key}={path}: only output_dir may be a URL; write to a local path and copy the file")
    return strip_file_scheme(path)


@contextmanager
def explain_write_errors(key: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError inside into a UserError that names `key=path`, or the error's own file if it is another one.

    An OSError without a file name is raised unchanged unless it is an error of the disk, as `_DISK_ERRORS` lists.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno not in _DISK_ERRORS:
            raise
        if error.filename is None or belongs_to(error.filename, path):
            raise UserError(f"cannot write {key}={path}: {error.strerror}") from error
        raise UserError(f"{os.fsdecode(error.filename)}: {error.strerror}") from error


def belongs_to(file: str | bytes, output: str | os.PathLike[str]) -> bool:
    """Whether a file is the output, is inside it, is a folder above it, or is named after it (`out.csv.part`)."""
    file, path = os.path.abspath(os.fsdecode(file)), os.path.abspath(output)
    beside = os.path.dirname(file) == os.path.dirname(path)
    named = os.path.basename(file).lstrip(".").startswith(os.path.splitext(os.path.basename(path))[0].lstrip("."))
    return (beside and named) or f"{file}/".startswith(f"{path}/") or path.startswith(f"{file}/")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return a file's current content, without a cache. Raises OSError; UserError if no handler has its scheme."""
    path = strip_file_scheme(os.fspath(path))
    if not is_remote(path):
        return Path(path).read_bytes()
    with path_manager(path) as manager, closing(manager.open(path, "rb")) as file:
        return file.read()


def exists(path: str) -> bool:
    """Whether a file exists, or the archive that holds it. Raises as `read_bytes` if this cannot be determined."""
    path = file_on_disk(strip_file_scheme(path))
    if not is_remote(path):
        return os.path.isfile(path)
    with path_manager(path) as manager:
        return bool(manager.exists(path))


def local_copy(path: str | os.PathLike[str]) -> str:
    """Return a local file with a path's content: the path itself, or a cached copy of a URL. Raises as `read_bytes`.

    A URL is fetched once. Of a file in an archive (see members.py), only that file is fetched, and for one in a local
    archive the result is a URL for FFmpeg. Copies are in the folder `mgvideo` of iopath's cache, which is
    `$FVCORE_CACHE`, by default `~/.torch/iopath_cache`.
    """
    path = strip_file_scheme(os.fspath(path))
    member = parse_member(path)
    if member is not None and not is_remote(path):
        return member.ffmpeg_url()
    if not is_remote(path):
        return path
    if member is not None:

        def fetch(target: IO[bytes]) -> None:
            target.write(read_range(*member[:3]))

        return fetch_once(path, fetch)
    with path_manager(path) as manager:
        return str(manager.get_local_path(path))


def read_range(path: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file from byte `offset`. Raises as `read_bytes`, and OSError if the file ends before."""
    path = strip_file_scheme(path)
    if size == 0:
        return b""
    if not is_remote(path):
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
    else:
        with path_manager(path) as manager:
            handler = _handlers[f"{_scheme(path)}://"]
            if hasattr(handler, "read_range"):
                data = handler.read_range(path, offset, size)
            else:
                with closing(manager.open(path, "rb")) as file:
                    file.seek(offset)
                    data = file.read(size)
    if len(data) < size:
        raise OSError(errno.EREMOTEIO, f"{path} ends at byte {offset + len(data)}, before {offset + size}")
    return data


def remote_version(path: str) -> str:
    """Return a text that changes with the content of a URL, from its headers; "" if its handler has none.

    Raises as `read_bytes`.
    """
    return _head(path)[1]


def file_size(path: str) -> int | None:
    """Return the bytes of a file; None if the handler of a URL cannot tell. Raises as `read_bytes`."""
    path = strip_file_scheme(path)
    return _head(path)[0] if is_remote(path) else os.path.getsize(path)


def _head(path: str) -> tuple[int | None, str]:
    with path_manager(path):
        handler = _handlers[f"{_scheme(path)}://"]
        return handler.head(path) if hasattr(handler, "head") else (None, "")


def list_folder(path: str) -> list[str]:
    """Return the names in a folder, local or at a URL whose handler can list. Raises as `read_bytes`."""
    path = strip_file_scheme(path)
    if not is_remote(path):
        return os.listdir(path)
    with path_manager(path) as manager:
        handler = _handlers[f"{_scheme(path)}://"]
        names = handler.list_names(path) if hasattr(handler, "list_names") else manager.ls(path)
        return [str(name) for name in names]


@contextmanager
def path_manager(path: str) -> Iterator[Any]:
    """Yield the PathManager for a URL. Any exception inside becomes an OSError with an errno and a one-line message.

    Raises:
        UserError: no handler has the URL's scheme.
    """
    scheme = f"{_scheme(path)}://"
    if scheme == "s3://" and scheme not in _handlers and importlib.util.find_spec("boto3"):
        _register_s3()
    if scheme == "hf://" and scheme not in _handlers and importlib.util.find_spec("huggingface_hub"):
        register_handler(_Hub())
    if scheme not in _handlers:
        hint = {
            "s3://": "; s3:// needs boto3 (pip install 'mgvideo[s3]')",
            "hf://": "; hf:// needs huggingface_hub (pip install 'mgvideo[hub]')",
        }.get(scheme, "")
        raise UserError(f"{path}: {scheme} has no handler; use one of {', '.join(_handlers)} and file://{hint}")
    try:
        yield _manager
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(errno.EREMOTEIO, _error_text(error)) from error
    except Exception as error:
        raise OSError(errno.EREMOTEIO, _error_text(error)) from error


def _scheme(path: str) -> str:
    """Return the scheme of a URL, without `://`."""
    match = _SCHEME.match(path)
    assert match is not None
    return match[1]


def _error_text(error: Exception) -> str:
    """Return the cause of an error in one line."""
    if isinstance(error, NotImplementedError):
        return "the handler of this scheme cannot do that"
    if isinstance(error, AssertionError) and not str(error):  # iopath's S3 handler asserts that the file exists
        return "no such file"
    if isinstance(error, URLError) and isinstance(error.reason, OSError):
        error = error.reason
    if isinstance(error.__cause__, Exception):  # iopath's S3 handler blames every failure on creating a client
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Web(PathHandler):
    """Reads from web and FTP servers.

    It replaces iopath's own handler, which caches by path without the server's name, caches even files that may change
    (lists), and prints a progress bar for each file.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return ["http://", "https://", "ftp://"]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if mode != "rb":
            raise NotImplementedError
        address = quote(path, safe="%/:?=&~+,;@!$'()*[]#")
        return urlopen(Request(address, **kwargs), timeout=SERVER_TIMEOUT_S)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        try:
            self._open(path, "rb").close()
        except HTTPError as error:
            if error.code in (403, 404, 410):
                return False
            raise
        return True

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        def fetch(target: IO[bytes]) -> None:
            with closing(self._open(path, "rb")) as source:
                shutil.copyfileobj(source, target)
                if getattr(source, "length", None):
                    raise OSError(errno.EREMOTEIO, "the server closed the connection before the end")

        return fetch_once(path, fetch)

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        with closing(self._open(path, "rb", headers={"Range": f"bytes={offset}-{offset + size - 1}"})) as source:
            if getattr(source, "status", 206) != 206:  # the server sends the whole file
                while offset > 0 and (skipped := source.read(min(offset, 1 << 20))):
                    offset -= len(skipped)
            data: bytes = source.read(size)
            return data

    def head(self, path: str) -> tuple[int | None, str]:
        with closing(self._open(path, "rb", method="HEAD")) as answer:
            headers: Any = getattr(answer, "headers", {})
            length = str(headers.get("Content-Length"))
            text = " ".join(str(headers.get(name)) for name in ("ETag", "Last-Modified"))
            return int(length) if length.isdecimal() else None, f"{text} {length}"


def hub_repository(path: str) -> str | None:
    """Return the repository of a path on the Hugging Face Hub, as `hf://org/name[@revision]`; None for other paths."""
    match = _HUB_PATH.fullmatch(path)
    return match[1] if match else None


class _Hub(PathHandler):
    """Reads `hf://org/name[@revision][/file]` from the Hugging Face Hub, through the cache of huggingface_hub."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["hf://"]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if mode != "rb":
            raise NotImplementedError
        return open(self._get_local_path(path), "rb")

    def _exists(self, path: str, **kwargs: Any) -> bool:
        try:
            self._get_local_path(path)
        except FileNotFoundError:
            return False
        return True

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

        match = _HUB_PATH.fullmatch(path)
        if match is None:
            raise UserError(f"{path}: write it as hf://ORGANISATION/NAME or hf://ORGANISATION/NAME/FILE")
        _, repository, revision, file = match.groups()
        endpoint = os.environ.get("HF_ENDPOINT")
        try:
            return str(hf_hub_download(repository, file or HUB_WEIGHTS, revision=revision, endpoint=endpoint))
        except LocalEntryNotFoundError as error:
            raise OSError(
                errno.EREMOTEIO, "the Hub cannot be reached, and the file is not in its cache", path
            ) from error
        except EntryNotFoundError as error:
            hint = "" if file else f"; it has no {HUB_WEIGHTS}, so add the name of a file"
            raise FileNotFoundError(errno.ENOENT, f"the repository has no such file{hint}", path) from error
        except RepositoryNotFoundError as error:
            raise OSError(
                errno.EACCES, "there is no such repository, or it is private (hf auth login sets your token)", path
            ) from error


def _register_s3() -> None:
    from iopath.common.s3 import S3PathHandler

    class S3(S3PathHandler):
        def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
            # Not iopath's: its path leaves out the bucket, and it sends two requests for each file that it has.
            def fetch(target: IO[bytes]) -> None:
                assert self._isfile(path)
                bucket, key = self._parse_uri(path)
                self._get_client(bucket).download_fileobj(bucket, key, target)

            return fetch_once(path, fetch)

        def read_range(self, path: str, offset: int, size: int) -> bytes:
            bucket, key = self._parse_uri(path)
            last = offset + size - 1
            answer = self._get_client(bucket).get_object(Bucket=bucket, Key=key, Range=f"bytes={offset}-{last}")
            data: bytes = answer["Body"].read()
            return data

        def list_names(self, path: str) -> list[str]:
            bucket, key = self._parse_uri(path)
            prefix = f"{key.rstrip('/')}/" if key else ""
            pages = self._get_client(bucket).get_paginator("list_objects_v2")
            files = pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/").search("Contents[].Key")
            return [name.removeprefix(prefix) for name in files if name]

        def head(self, path: str) -> tuple[int, str]:
            bucket, key = self._parse_uri(path)
            answer = self._get_client(bucket).head_object(Bucket=bucket, Key=key)
            return int(answer["ContentLength"]), f"{answer['ETag']} {answer['ContentLength']}"

    handler = S3(profile=None)
    # processes must not share a connection
    os.register_at_fork(after_in_child=lambda: handler.__dict__.pop("client", None))
    register_handler(handler)


register_handler(_Web())
