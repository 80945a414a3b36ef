"""Paths that may be URLs, through iopath: what is read at once, what is kept as a local copy, and who serves a scheme.

`http://`, `https://` and `ftp://` are read; `s3://` is read and written where boto3 is installed; `file://` is a local
path. Other schemes come with a handler given to `register`.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote
from urllib.request import urlopen

from iopath.common.file_io import PathHandler, PathManager, get_cache_dir

from mgvideo.errors import UserError

SERVER_TIMEOUT_S = 20.0  # seconds in which a server has to say something
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_prefixes: list[str] = []
_manager = PathManager()
logging.getLogger("iopath").addHandler(logging.NullHandler())  # what it logs as an error is raised as well


def register(handler: PathHandler) -> None:
    """Serve the schemes of an iopath handler; only a handler that writes can hold an output_dir."""
    _manager.register_handler(handler)
    _prefixes.extend(handler._get_supported_prefixes())


def plain(path: str) -> str:
    """A path with `file://` taken off."""
    return unquote(re.sub(r"^file://(localhost)?", "", path)) if path.startswith("file://") else path


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of another place than this machine's file system."""
    return _SCHEME.match(plain(os.fspath(path))) is not None


def join(root: str, path: str) -> str:
    """A path under a root; one that is absolute, or a URL, as it is."""
    path = plain(path)
    return path if is_remote(path) else os.path.join(plain(root), path)


def relative(path: str, root: str) -> str:
    """What `join(root, …)` makes this path of; a URL that is not under the root stays as it is."""
    if not is_remote(path):
        return path if is_remote(root) else os.path.relpath(path, plain(root))
    return path.removeprefix(f"{root.rstrip('/')}/")


def to_write(key: str, path: str) -> str:
    """The local path that a key names to write to; raises UserError for a URL."""
    if is_remote(path):
        raise UserError(f"{key}={path}: only output_dir may be a URL; write to a local path and copy it")
    return plain(path)


@contextmanager
def writing(key: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError inside into a UserError that names the file at fault: the path that `key` names, or another."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno not in _DISK_ERRORS:
            raise
        if error.filename is None or belongs_to(error.filename, path):
            raise UserError(f"cannot write {key}={path}: {error.strerror}") from error
        raise UserError(f"{os.fsdecode(error.filename)}: {error.strerror}") from error


def belongs_to(file: str | bytes, output: str | os.PathLike[str]) -> bool:
    """Whether a file is an output, lies in it, is a folder above it, or is named after it (`out.csv.part`)."""
    file, path = os.path.abspath(os.fsdecode(file)), os.path.abspath(output)
    beside = os.path.dirname(file) == os.path.dirname(path)
    named = os.path.basename(file).lstrip(".").startswith(os.path.splitext(os.path.basename(path))[0].lstrip("."))
    return (beside and named) or f"{file}/".startswith(f"{path}/") or path.startswith(f"{file}/")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file's content as it is now: nothing is cached. Raises OSError; UserError where nobody serves its scheme."""
    path = plain(os.fspath(path))
    if not is_remote(path):
        return Path(path).read_bytes()
    with reaching(path) as manager, closing(manager.open(path, "rb")) as file:
        return file.read()


def exists(path: str) -> bool:
    """Whether there is a file; raises as `read_bytes` does where that cannot be told."""
    path = plain(path)
    if not is_remote(path):
        return os.path.isfile(path)
    with reaching(path) as manager:
        return bool(manager.exists(path))


def local(path: str | os.PathLike[str]) -> str:
    """A file on this machine with a path's content: of a URL a copy, fetched once and kept; raises as `read_bytes`.

    Copies are kept in `mgvideo` under iopath's cache, `$FVCORE_CACHE` or else `~/.torch/iopath_cache`.
    """
    path = plain(os.fspath(path))
    if not is_remote(path):
        return path
    with reaching(path) as manager:
        return str(manager.get_local_path(path))


@contextmanager
def reaching(path: str) -> Iterator[Any]:
    """The PathManager that serves a URL; what goes wrong inside becomes an OSError, whatever its library raises."""
    scheme = f"{_scheme(path)}://"
    if scheme == "s3://" and scheme not in _prefixes and importlib.util.find_spec("boto3"):
        _register_s3()
    if scheme not in _prefixes:
        more = "; s3:// needs boto3 (pip install 'mgvideo[s3]')" if scheme == "s3://" else ""
        raise UserError(f"{path}: {scheme} is not served; there are {', '.join(_prefixes)} and file://{more}")
    try:
        yield _manager
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(errno.EREMOTEIO, _line(error)) from error
    except Exception as error:
        raise OSError(errno.EREMOTEIO, _line(error)) from error


def _scheme(path: str) -> str:
    match = _SCHEME.match(path)
    assert match is not None
    return match[1]


def _line(error: Exception) -> str:
    if isinstance(error, NotImplementedError):
        return "the handler of this scheme cannot do that"
    if isinstance(error, AssertionError) and not str(error):  # iopath's S3 asserts that there is a file
        return "no such file"
    if isinstance(error, URLError) and isinstance(error.reason, OSError):
        error = error.reason
    if isinstance(error.__cause__, Exception):  # iopath's S3 says of every failure that it was in making a client
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _cached(path: str) -> Path:
    """Where the copy of a URL is kept: no URL can name a place outside, nor that of another URL."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(get_cache_dir()) / "mgvideo" / digest[:2] / f"{digest}-{path.rsplit('/', 1)[-1][-100:]}"


class _Web(PathHandler):
    """Reads from web and FTP servers.

    iopath's own handler keeps copies by path alone, whichever server they came from and for lists as well, and draws a
    bar for each file.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return ["http://", "https://", "ftp://"]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if mode != "rb":
            raise NotImplementedError
        return urlopen(quote(path, safe="%/:?=&~+,;@!$'()*[]#"), timeout=SERVER_TIMEOUT_S)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        try:
            self._open(path, "rb").close()
        except HTTPError as error:
            if error.code in (403, 404, 410):
                return False
            raise
        return True

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        kept = _cached(path)
        if force or not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=kept.parent, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as target, self._open(path, "rb") as source:
                    shutil.copyfileobj(source, target)
                    if getattr(source, "length", None):
                        raise OSError(errno.EREMOTEIO, "the server closed the connection before the end")
                os.replace(part, kept)  # of several workers that fetch it at a time, each brings it whole
            finally:
                Path(part).unlink(missing_ok=True)
        return str(kept)


def _register_s3() -> None:
    from iopath.common.s3 import S3PathHandler

    class S3(S3PathHandler):
        def _local_cache_path(self, path: str) -> str:  # iopath's leaves out the bucket
            return str(_cached(path))

    handler = S3(profile=None)
    os.register_at_fork(after_in_child=lambda: handler.__dict__.pop("client", None))  # a connection is not to be shared
    register(handler)


register(_Web())
