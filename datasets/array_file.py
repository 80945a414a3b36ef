"""Named arrays and a JSON header in one file, which processes map into memory and so share.

The file is a start line (`_START`), the header, and the arrays, each at a multiple of 64 bytes. It is written
atomically. A file that is incomplete, damaged or of another version is refused with a ValueError, so that the caller
builds it anew.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
import weakref
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from mgvideo.errors import UserError

_START = struct.Struct("<8sIIQ")  # magic, bytes of the header, its CRC-32, bytes of the file
_MAGIC = b"mgvarr02"
_ALIGNMENT = 64
_MIN_SHARED_BYTES = 100_000  # smaller arrays in memory are copied, because that costs less than a file


class SharedArrays(Mapping[str, np.ndarray]):
    """Read-only arrays by name, and a header of plain values.

    Pickled arrays are not copied: the other process maps the same file. Arrays in memory, unless they are small, are
    first written to a temporary file, which is deleted with this object.

    Attributes:
        header: Plain values, as JSON has them.
        path: The file that holds the arrays; None: they are in memory.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any], path: str | None = None) -> None:
        self._arrays, self.header, self.path = dict(arrays), dict(header), path
        self._identity = _file_identity(path) if path else None
        for array in self._arrays.values():
            array.flags.writeable = False

    @classmethod
    def open(cls, path: str, verify: bool = True) -> SharedArrays:
        """Map a file into memory. With `verify`, compare the arrays with their checksum.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is damaged or has another format.
        """
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ValueError("is empty")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls.parse(content, verify, path)

    @classmethod
    def parse(cls, content: mmap.mmap | bytes, verify: bool = True, path: str | None = None) -> SharedArrays:
        """Return the arrays in the content of a file, without copying them. Raises ValueError as `open`."""
        header, names, start = _read_header(content)
        if verify and zlib.crc32(memoryview(content)[start:]) != names["checksum"]:
            raise ValueError("its checksum is wrong")
        arrays = {}
        for name, dtype, shape, offset in names["arrays"]:
            count = int(np.prod(shape))
            flat = np.frombuffer(content, np.dtype(dtype), count, start + offset) if count else np.empty(0, dtype)
            arrays[name] = flat.reshape(shape)
        return cls(arrays, header, path)

    def write(self, path: Path) -> None:
        """Write a file atomically. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                self._write_to(file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _write_to(self, file: IO[bytes]) -> None:
        rows, offset, checksum = [], 0, 0
        chunks: list[memoryview | bytes] = []
        for name, array in self._arrays.items():
            data = np.ascontiguousarray(array)
            rows.append([name, data.dtype.str, list(data.shape), offset])
            padding = b"\0" * (-data.nbytes % _ALIGNMENT)
            chunks += [data.reshape(-1).view(np.uint8).data, padding]
            offset += data.nbytes + len(padding)
        for chunk in chunks:
            checksum = zlib.crc32(chunk, checksum)
        header = json.dumps([self.header, {"arrays": rows, "checksum": checksum}]).encode()
        header += b" " * (-(_START.size + len(header)) % _ALIGNMENT)
        size = _START.size + len(header) + sum(len(chunk) for chunk in chunks)
        file.write(_START.pack(_MAGIC, len(header), zlib.crc32(header), size) + header)
        file.writelines(chunks)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Any:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None and sum(array.nbytes for array in self._arrays.values()) < _MIN_SHARED_BYTES:
            return SharedArrays, (self._arrays, self.header)
        if self.path is None or _file_identity(self.path) != self._identity:  # another job has replaced the file
            with suppress(OSError):
                self._write_temporary()
        if self.path is None:  # no space for a temporary file: copy the arrays
            return SharedArrays, (self._arrays, self.header)
        return _reopen, (self.path, self._identity)

    def _write_temporary(self) -> None:
        self.path = None
        folder = tempfile.mkdtemp(prefix="mgvideo-arrays-")
        path = os.path.join(folder, "arrays")
        weakref.finalize(self, _remove_temporary, folder, os.getpid())
        self.write(Path(path))
        self.path, self._identity = path, _file_identity(path)


def _remove_temporary(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked worker
        with suppress(OSError):
            os.unlink(os.path.join(folder, "arrays"))
        with suppress(OSError):
            os.rmdir(folder)


def _reopen(path: str, identity: tuple[int, int, int]) -> SharedArrays:
    """Map the file of another process's arrays into memory."""
    with suppress(OSError, ValueError):
        arrays = SharedArrays.open(path, verify=False)
        if arrays._identity == identity:
            return arrays
    raise UserError(f"{path}: was deleted or replaced while a loader worker started; repeat the command")


def _file_identity(path: str) -> tuple[int, int, int] | None:
    with suppress(OSError):
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino, stat.st_mtime_ns
    return None


def _read_header(content: mmap.mmap | bytes) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the header, the description of the arrays, and the position of the first one. Raises ValueError."""
    if len(content) < _START.size:
        raise ValueError("is incomplete")
    magic, length, checksum, size = _START.unpack(content[: _START.size])
    text = content[_START.size : _START.size + length] if magic == _MAGIC else b""
    if magic != _MAGIC or zlib.crc32(text) != checksum or len(content) != size:
        raise ValueError("is damaged or of another version")
    header, names = json.loads(text)
    return header, names, _START.size + length


class Strings(Sequence[str]):
    """File names in two arrays: all bytes one after the other (uint8), and where each name ends (int64 `[n + 1]`)."""

    def __init__(self, content: np.ndarray, bounds: np.ndarray) -> None:
        self.content, self.bounds = content, bounds

    @classmethod
    def pack(cls, names: Sequence[str]) -> Strings:
        """Pack names, which may contain bytes that are not UTF-8 (surrogateescape)."""
        encoded = [os.fsencode(name) for name in names]
        bounds = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=bounds[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: Any) -> Any:
        return os.fsdecode(self.raw(index))

    def raw(self, index: int) -> bytes:
        """Return the bytes of a name; raises IndexError."""
        number = range(len(self))[index]
        return self.content[self.bounds[number] : self.bounds[number + 1]].tobytes()

    def find(self, name: str) -> int | None:
        """Return the index of a name by bisection, or None. The names must be sorted by their bytes."""
        wanted, low, high = os.fsencode(name), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            found = self.raw(middle)
            if found == wanted:
                return middle
            low, high = (middle + 1, high) if found < wanted else (low, middle)
        return None
