"""An output_dir at a URL: the run writes to a local folder, which is copied to the remote after each checkpoint."""

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

from .checkpoints import checkpoint_step
from .paths import is_remote, path_manager, strip_file_scheme

INDEX = "mgvideo_files.json"


@dataclass
class Index:
    """The files and symlinks of a remote or of a local folder.

    Remotes have no symlinks, so they exist only in this index. It is written after the files.
    """

    files: dict[str, list[int]] = field(default_factory=dict)  # name → [size in bytes, modification time in ns]
    links: dict[str, str] = field(default_factory=dict)  # name → target


class RemoteOutput:
    """An output_dir and its local `folder`: the output_dir itself, or `runs/remote/SCHEME/…` for a URL.

    Remotes have neither an atomic rename nor a sync to disk. So checkpoints are completed in the local folder first. An
    incomplete copy on the remote fails its checksum, and the checkpoint before it is used.
    """

    def __init__(self, output_dir: str) -> None:
        self.address = output_dir.rstrip("/") if is_remote(output_dir) else None
        parts = [part for part in output_dir.replace("://", "/").split("/") if part not in ("", ".", "..")]
        self.folder = Path("runs/remote", *parts) if self.address else Path(strip_file_scheme(output_dir))
        self._lock = threading.Lock()
        self._remote_index = Index()

    @contextmanager
    def synced(self) -> Iterator[None]:
        """Fetch the remote's files if its checkpoint is newer; then copy the folder there, and again at the end.

        Only rank 0 does this, and only for a URL.

        Raises:
            UserError: the remote cannot be written.
        """
        if self.address is None or rank() != 0:
            yield
            return
        try:
            self._start()
        except OSError as error:
            raise UserError(f"output_dir={self.address}: cannot be used: {error.strerror}") from error
        try:
            yield
        finally:
            self.push()

    def source(self, path: Path) -> str:
        """Return the path or URL at which every rank, on this node or another, can read a file of the folder."""
        return f"{self.address}/{path.relative_to(self.folder.resolve()).as_posix()}" if self.address else str(path)

    def push(self) -> None:
        """Copy new files to the remote. If that fails, print a warning; the next call copies them again."""
        if self.address is None:
            return
        try:
            self._push()
        except OSError as error:
            message = f"cannot write to {self.address}: {error.strerror}"
            print(f"warning: {message}; all files are in {self.folder}", file=sys.stderr, flush=True)

    def _start(self) -> None:
        """Fetch from the remote if it is ahead, and copy the folder to it."""
        with path_manager(f"{self.address}/") as manager:
            manager.mkdirs(f"{self.address}/")
            has_index = manager.exists(f"{self.address}/{INDEX}")
        self._remote_index = self._read_index() if has_index else Index()
        if _newest_step(self._remote_index.files) > _newest_step(self._index().files):
            self._fetch()
        self._push()

    def _push(self) -> None:
        """Copy new files, then write the index, then remove files that the folder no longer has."""
        with self._lock, path_manager(f"{self.address}/") as manager:
            index = self._index()
            for name in sorted(index.files, key=lambda name: (name.endswith(".pt"), name)):  # checksums first
                if self._remote_index.files.get(name) != index.files[name]:
                    manager.mkdirs(f"{self.address}/{PurePosixPath(name).parent}/")
                    if manager.copy_from_local(str(self.folder / name), f"{self.address}/{name}", True) is False:
                        raise OSError(f"{name} was not written")
            with closing(manager.open(f"{self.address}/{INDEX}", "w")) as file:
                file.write(json.dumps(asdict(index), indent=1))
            for name in self._remote_index.files.keys() - index.files.keys():
                manager.rm(f"{self.address}/{name}")
            self._remote_index = index

    def _index(self) -> Index:
        """Return the index of the local folder, without files that are being written and links that point elsewhere."""
        index = Index()
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_symlink():
                if not os.path.isabs(target := os.readlink(path)):  # wandb links to its log files on this machine
                    index.links[name] = target
            elif path.is_file() and path.name != ".lock" and path.suffix != ".tmp":
                index.files[name] = [path.stat().st_size, path.stat().st_mtime_ns]
        return index

    def _read_index(self) -> Index:
        """Return the remote's index. Raises UserError if it names a path outside of the run's folder."""
        with path_manager(f"{self.address}/") as manager, closing(manager.open(f"{self.address}/{INDEX}", "r")) as file:
            index = Index(**json.loads(file.read()))
        for name in (*index.files, *index.links, *index.links.values()):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{self.address}/{INDEX} names {name}, which is outside of the run: remove it there")
        return index

    def _fetch(self) -> None:
        """Replace the folder's files by the remote's, with their modification times, so that none is copied back."""
        local = self._index()
        for name in (*local.files, *local.links):
            (self.folder / name).unlink()
        with path_manager(f"{self.address}/") as manager:
            for name, (_, modified_ns) in list(self._remote_index.files.items()):
                if not manager.exists(f"{self.address}/{name}"):  # somebody deleted it on the remote
                    del self._remote_index.files[name]
                    continue
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with closing(manager.open(f"{self.address}/{name}", "rb")) as source, open(path, "wb") as copy:
                    shutil.copyfileobj(source, copy)
                os.utime(path, ns=(modified_ns, modified_ns))
        for name, target in self._remote_index.links.items():
            (self.folder / name).symlink_to(target)


def _newest_step(names: Iterable[str]) -> int:
    """Return the largest step of the checkpoints among file names, -1 for none; without archived checkpoints."""
    steps = [
        checkpoint_step(PurePosixPath(name).name) for name in names if PurePosixPath(name).parent.name == "checkpoints"
    ]
    return max((step for step in steps if step is not None), default=-1)
