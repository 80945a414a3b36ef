"""A file that many processes share and add records to: what is known of each video of a dataset, by path.

The file is memory-mapped, so that a lookup reads only the pages of its record. It only grows: hash tables, of which
each new one is four times larger, and records lie behind one another.

    header   MAGIC, 8 bytes
    table    slots, used slots, position of the next table or 0: uint64 each; then for each slot
             the hash of a key and the position of its record: uint64 each, 0 if it is empty
    record   CRC-32 of the description, its size: uint32 each; the description as JSON; arrays, aligned to 8 bytes

Keys are paths relative to the folder of the videos, so that a dataset can be moved, or absolute ones outside it. Paths
of files in archives are those of mgvideo.storage.members.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import sys
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from filelock import FileLock

from mgvideo.storage.members import file_on_disk
from mgvideo.storage.paths import is_remote, strip_file_scheme

from .scan import LISTINGS

FILE_NAME = "packets.index"  # in the folder LISTINGS, so that it does not change the times of the dataset's folder
MAGIC = b"mgvpkt01"
TABLE, SLOT, RECORD = struct.Struct("<3Q"), struct.Struct("<2Q"), struct.Struct("<2I")
FIRST_SLOTS = 256  # of the first table
GROWTH = 4
LOCK_TIMEOUT_S = 20.0


class DamagedIndexError(Exception):
    """Raised when the content of an index file contradicts itself."""


class PacketIndex:
    """The index file of the videos below a folder. Looking up and adding never raise: without it, files are read anew.

    `folder` is that of the file by default. Holds no open file when it is pickled, so that workers can receive it.
    """

    def __init__(self, file: str, folder: str | None = None) -> None:
        self.file = os.path.abspath(file)
        self.folder = os.path.dirname(self.file) if folder is None else os.path.abspath(folder)
        self.writable = True
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def find(self, path: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Return the description and arrays of a video, or None if there are none or the file has changed since."""
        try:
            status, key = os.stat(file_on_disk(path)), self._key(path)
            position = self._find(_hash(key))
            if position is None:
                return None
            description, arrays = self._read(position)
            if description["key"] != key:
                return None
        except OSError:
            return None
        except (DamagedIndexError, struct.error):
            self._replace_damaged()
            return None
        except (ValueError, KeyError, TypeError):  # `add` will replace this record alone
            _print_once("record", f"warning: {self.file}: the record of {path} is damaged; it is indexed again")
            return None
        if (description["size"], description["changed"]) != (status.st_size, status.st_mtime_ns):
            _print_once("changed", f"note: {path} has changed since it was indexed in {self.file}; it is indexed again")
            return None
        return description, arrays

    def add(self, path: str, status: os.stat_result, description: dict[str, Any], arrays: Mapping[str, Any]) -> None:
        """Add or replace a video. `status` is that of the file before it was read."""
        if not self.writable:
            return
        key = self._key(path)
        entry = {"key": key, "size": status.st_size, "changed": status.st_mtime_ns, **description}
        try:
            os.makedirs(os.path.dirname(self.file), exist_ok=True)
            with FileLock(f"{self.file}.lock", timeout=LOCK_TIMEOUT_S), self._open() as file:
                position = _append(file, _record(entry, arrays))
                _link(file, _hash(key), position)
        except (DamagedIndexError, struct.error):
            self._replace_damaged()
        except OSError as error:  # a read-only folder, a full disk
            self.writable = False
            reason = error.strerror or str(error)
            _print_once("write", f"note: {self.file} cannot be written: {reason}; videos stay without index")

    def check(self) -> None:
        """Replace the file by an empty one, with a note, if its tables are damaged."""
        try:
            self._find(1)
        except OSError:
            return
        except (DamagedIndexError, struct.error):
            self._replace_damaged()

    def __len__(self) -> int:
        """Return the number of videos."""
        try:
            self._remap()
            assert self._map is not None
            return sum(used for _, _, used in _tables(self._map))
        except (OSError, DamagedIndexError, struct.error):
            return 0

    def _key(self, path: str) -> str:
        path = os.path.abspath(path)
        return os.path.relpath(path, self.folder) if path.startswith(f"{self.folder.rstrip('/')}/") else path

    def _find(self, digest: int) -> int | None:
        """Return the position of the record of a hash, or None. Maps the file again if it has grown."""
        if self._map is None:
            self._remap()
        assert self._map is not None
        slot = _find_slot(self._map, digest)
        if slot is None or slot[1] == 0:
            if os.stat(self.file).st_size == len(self._map):
                return None
            self._remap()
            slot = _find_slot(self._map, digest)
        if slot is None or slot[1] == 0:
            return None
        if os.stat(self.file).st_size > len(self._map) and slot[1] >= len(self._map) - RECORD.size:
            self._remap()
        return slot[1]

    def _remap(self) -> None:
        with open(self.file, "rb") as file:
            if os.fstat(file.fileno()).st_size < len(MAGIC) + TABLE.size:
                raise DamagedIndexError("too short")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # read no pages ahead: the next lookup needs others
            self._map.madvise(mmap.MADV_RANDOM)
        if self._map[: len(MAGIC)] != MAGIC:
            raise DamagedIndexError("not an index")

    def _read(self, position: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        data = self._map
        assert data is not None
        if position + RECORD.size > len(data):
            raise ValueError("a record is outside the file")
        checksum, size = RECORD.unpack_from(data, position)
        start = position + RECORD.size
        text = data[start : start + size]
        if zlib.crc32(text) != checksum:
            raise ValueError("a record is damaged")
        description = json.loads(text)
        arrays, offset = {}, _aligned(start + size)
        for name, kind, count in description.pop("arrays"):
            arrays[name] = np.frombuffer(data, kind, count, offset)
            offset = _aligned(offset + arrays[name].nbytes)
        return description, arrays

    def _open(self) -> Any:
        """Open the file for changes; creates it with an empty table. Raises DamagedIndexError."""
        with suppress(FileExistsError), open(self.file, "xb") as new:
            new.write(_empty())
        file = open(self.file, "r+b", buffering=0)  # noqa: SIM115
        if file.read(len(MAGIC)) != MAGIC:
            file.close()
            raise DamagedIndexError("not an index")
        return file

    def _replace_damaged(self) -> None:
        """Put an empty index in place of a damaged one, unless another process has done so."""
        damaged, self._map = self._map, None
        if not self.writable:
            return
        try:
            with FileLock(f"{self.file}.lock", timeout=LOCK_TIMEOUT_S):
                with suppress(DamagedIndexError, struct.error):
                    self._remap()
                    assert self._map is not None
                    _find_slot(self._map, 1)
                    if damaged is None or self._map[: 1 << 16] != damaged[: 1 << 16]:
                        return
                part = f"{self.file}.part"
                with open(part, "wb") as file:
                    file.write(_empty())
                os.replace(part, self.file)
            self._map = None
            _print_once("damaged", f"warning: {self.file} is damaged; it is built again")
        except OSError as error:
            self.writable = False
            reason = error.strerror or str(error)
            _print_once("write", f"note: {self.file} is damaged and cannot be replaced: {reason}; it is not used")


def find_index(path: str, files: Mapping[str, PacketIndex]) -> PacketIndex | None:
    """Return the index of the folder that contains a video, from a mapping of folders, or else the first of them."""
    inside = [folder for folder in files if os.path.abspath(path).startswith(f"{folder.rstrip('/')}/")]
    return files[max(inside, key=len)] if inside else next(iter(files.values()), None)


def folder_index(folder: str | None) -> dict[str, PacketIndex]:
    """Return the index file of a local folder by folder; empty for None and URLs."""
    if folder is None or is_remote(folder):
        return {}
    folder = os.path.abspath(strip_file_scheme(folder))
    return {folder: PacketIndex(os.path.join(folder, LISTINGS, FILE_NAME), folder)}


def _hash(key: str) -> int:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _aligned(position: int) -> int:
    return -(-position // 8) * 8


def _empty() -> bytes:
    return MAGIC + TABLE.pack(FIRST_SLOTS, 0, 0) + bytes(FIRST_SLOTS * SLOT.size)


def _record(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return a record; its arrays are aligned if the record is."""
    columns = [(name, array.dtype.str, len(array)) for name, array in arrays.items()]
    text = json.dumps({**description, "arrays": columns}).encode()
    data = bytearray(RECORD.pack(zlib.crc32(text), len(text)) + text)
    for array in arrays.values():
        data += bytes(_aligned(len(data)) - len(data))
        data += np.ascontiguousarray(array).tobytes()
    return bytes(data)


def _tables(data: Any) -> Any:
    """Yield (position of the first slot, slots, used slots) of each table. Raises DamagedIndexError."""
    position, least = len(MAGIC), 1
    while position:
        slots, used, following = TABLE.unpack_from(data, position)
        start = position + TABLE.size
        if slots < least or used > slots or start + slots * SLOT.size > len(data) or 0 < following < start:
            raise DamagedIndexError("a table is damaged")
        yield start, slots, used
        position, least = following, slots + 1
        if position + TABLE.size > len(data):  # added since the file was mapped
            return


def _find_slot(data: Any, digest: int) -> tuple[int, int] | None:
    """Return the position of the slot of a hash, or of the empty slot for it in the last table, and its record's.

    None: the last table has no empty slot. Raises DamagedIndexError.
    """
    found = None
    for start, slots, _ in _tables(data):
        found = None
        for step in range(slots):
            place = start + (digest + step) % slots * SLOT.size
            stored, position = SLOT.unpack_from(data, place)
            if stored == digest:
                return place, position
            if not stored:
                found = place, 0
                break
    return found


def _append(file: Any, data: bytes) -> int:
    """Append data at an aligned position, and return it."""
    position = _aligned(file.seek(0, os.SEEK_END))
    _write(file, position, data)
    return position


def _write(file: Any, position: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, position)
        view, position = view[written:], position + written


def _link(file: Any, digest: int, position: int) -> None:
    """Let the slot of a hash point to a record. Starts a new table if the last one is half full."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        *_, (start, slots, used) = _tables(data)
        slot = _find_slot(data, digest)
    if slot is not None and slot[1]:
        _write(file, slot[0], SLOT.pack(digest, position))
        return
    head = start - TABLE.size
    if slot is None or 2 * (used + 1) > slots:
        slots, used, previous = slots * GROWTH, 0, head
        head = _append(file, TABLE.pack(slots, 0, 0) + bytes(slots * SLOT.size))
        _write(file, previous + 16, struct.pack("<Q", head))
        slot = head + TABLE.size + digest % slots * SLOT.size, 0
    _write(file, slot[0], SLOT.pack(digest, position))
    _write(file, head + 8, struct.pack("<Q", used + 1))


_printed: set[str] = set()


def _print_once(kind: str, line: str) -> None:
    """Print a line to stderr, once a process for each kind."""
    if kind not in _printed:
        _printed.add(kind)
        print(line, file=sys.stderr, flush=True)
