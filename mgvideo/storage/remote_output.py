"""An output_dir on a remote: the run writes into a local folder, which is copied there after each checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from mgvideo.distributed.collectives import rank
from mgvideo.errors import UserError

from .checkpoints import step_of
from .paths import is_remote, plain, reaching

INDEX = "mgvideo_files.json"


@dataclass
class Index:
    """What a remote holds: each file's size and time, and links, of which remotes know nothing. Written last."""

    files: dict[str, list[int]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)


class RemoteOutput:
    """The local `folder` of an output_dir: itself, or `runs/remote/SCHEME/…` for a URL.

    A remote offers neither a rename nor a sync to disk. So checkpoints are made whole here, and a copy that was cut
    short there fails its checksum; the one before is used then.
    """

    def __init__(self, output_dir: str) -> None:
        self.address = output_dir.rstrip("/") if is_remote(output_dir) else None
        parts = [part for part in output_dir.replace("://", "/").split("/") if part not in ("", ".", "..")]
        self.folder = Path("runs/remote", *parts) if self.address else Path(plain(output_dir))
        self._lock = threading.Lock()
        self._there = Index()

    @contextmanager
    def synced(self) -> Iterator[None]:
        """Inside, the remote follows the folder; first the folder follows the remote where that is ahead of it.

        Raises:
            UserError: nothing can be written there.
        """
        if self.address is None or rank() != 0:
            yield
            return
        try:
            self._begin()
        except OSError as error:
            raise UserError(f"output_dir={self.address}: cannot be used: {error.strerror}") from error
        try:
            yield
        finally:
            self.push()

    def source(self, path: Path) -> str:
        """Where every rank, on this node or another, can read a file of the folder."""
        return f"{self.address}/{path.relative_to(self.folder.resolve()).as_posix()}" if self.address else str(path)

    def push(self) -> None:
        """Copy what is new; where that fails, say so and leave it to the next time: the folder has everything."""
        if self.address is None:
            return
        try:
            self._push()
        except OSError as error:
            where = f"cannot write to {self.address}: {error.strerror}"
            print(f"warning: {where}; everything is in {self.folder}", file=sys.stderr, flush=True)

    def _begin(self) -> None:
        with reaching(f"{self.address}/") as manager:
            manager.mkdirs(f"{self.address}/")
            there = manager.exists(f"{self.address}/{INDEX}")
        self._there = self._read_index() if there else Index()
        if _newest(self._there.files) > _newest(self._index().files):
            self._fetch()
        self._push()

    def _push(self) -> None:
        with self._lock, reaching(f"{self.address}/") as manager:
            now = self._index()
            for name in sorted(now.files, key=lambda name: (name.endswith(".pt"), name)):  # checksums first
                if self._there.files.get(name) != now.files[name]:
                    manager.mkdirs(f"{self.address}/{PurePosixPath(name).parent}/")
                    if manager.copy_from_local(str(self.folder / name), f"{self.address}/{name}", True) is False:
                        raise OSError(f"{name} was not taken")
            with closing(manager.open(f"{self.address}/{INDEX}", "w")) as file:
                file.write(json.dumps(asdict(now), indent=1))
            for name in self._there.files.keys() - now.files.keys():
                manager.rm(f"{self.address}/{name}")
            self._there = now

    def _index(self) -> Index:
        """What the folder holds, half-written files aside."""
        index = Index()
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_symlink():
                index.links[name] = os.readlink(path)
            elif path.is_file() and path.name != ".lock" and path.suffix != ".tmp":
                index.files[name] = [path.stat().st_size, path.stat().st_mtime_ns]
        return index

    def _read_index(self) -> Index:
        with reaching(f"{self.address}/") as manager, closing(manager.open(f"{self.address}/{INDEX}", "r")) as file:
            index = Index(**json.loads(file.read()))
        for name in (*index.files, *index.links, *index.links.values()):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{self.address}/{INDEX}: names {name}, which is outside of the run")
        return index

    def _fetch(self) -> None:
        """Make the folder what the remote is; times included, so that nothing is sent back."""
        old = self._index()
        for name in (*old.files, *old.links):
            (self.folder / name).unlink()
        with reaching(f"{self.address}/") as manager:
            for name, (_, time) in list(self._there.files.items()):
                if not manager.exists(f"{self.address}/{name}"):  # somebody took it away
                    del self._there.files[name]
                    continue
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with closing(manager.open(f"{self.address}/{name}", "rb")) as source, open(path, "wb") as copy:
                    shutil.copyfileobj(source, copy)
                os.utime(path, ns=(time, time))
        for name, target in self._there.links.items():
            (self.folder / name).symlink_to(target)


def _newest(names: Iterable[str]) -> int:
    """The newest checkpoint's step among file names, -1 for none; those that were moved aside do not count."""
    steps = [step_of(PurePosixPath(name).name) for name in names if PurePosixPath(name).parent.name == "checkpoints"]
    return max((step for step in steps if step is not None), default=-1)
