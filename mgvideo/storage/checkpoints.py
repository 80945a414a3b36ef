"""Checkpoints: written whole or not at all, off the training step's path, and read without running code from them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import torch

from mgvideo.errors import UserError

from .paths import is_remote, read_bytes

_NAME = re.compile(r"step_(\d+)\.pt")


def step_of(name: str) -> int | None:
    """The step of a checkpoint's file name, None for any other file."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def _to_cpu(item: Any) -> Any:
    """A copy on the CPU, so that training may go on while it is written."""
    if isinstance(item, torch.Tensor):
        return item.detach().to("cpu", copy=True)
    if isinstance(item, Mapping):
        return {key: _to_cpu(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(_to_cpu(value) for value in item)
    return item


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; what was written before it is intact") from error


def _digest(path: Path) -> Path:
    return path.with_suffix(".sha256")


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold a run's folder, so that no second run writes into it; released by the death of this process at the latest.

    Raises:
        UserError: another process holds it.
    """
    path = folder / ".lock"
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked workers would hold that as well
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"output_dir={folder} is in use by another run ({holder}): wait for it, or give another output_dir"
            ) from error
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys of two flat configs that differ, each with both values."""
    keys = sorted(saved.keys() | now.keys())
    return [
        f"{key} was {saved.get(key, 'not there')}, is {now.get(key, 'not there')}"
        for key in keys
        if saved.get(key) != now.get(key)
    ]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, a file or a URL; tensors on the CPU.

    Raises:
        UserError: no such file, one that is not what was written, or one with code in it.
    """
    try:
        if not is_remote(path):
            path = Path(path).resolve()  # best.pt is a link
        data = read_bytes(path)
        expected = read_bytes(re.sub(r"\.pt$", ".sha256", str(path))).split() if str(path).endswith(".pt") else None
    except OSError as error:
        raise UserError(f"cannot read checkpoint {error.filename or path}: {error.strerror}") from error
    foreign = f"{path} is no checkpoint of a run: init_from=… starts from its weights, resume cannot"
    if expected is None:
        raise UserError(foreign)
    if hashlib.sha256(data).hexdigest().encode() not in expected:
        raise UserError(f"checkpoint {path} is damaged: its content does not match its checksum")
    try:
        state = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path} holds more than tensors and plain values: it was not read") from error
    except Exception as error:  # what torch raises over a file that it did not write varies
        raise UserError(f"checkpoint {path} is damaged: {type(error).__name__}") from error
    if not isinstance(state, dict) or not {"made_of", "progress"} <= state.keys():
        raise UserError(foreign)
    return state


class Checkpoints:
    """The checkpoints of a run: the newest `keep`, and the best, which `best.pt` links to.

    Each holds `made_of`, the flat config that a resumed run must share, and `versions`, of the software that writes it.
    `written` is called after each.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 3,
        made_of: Mapping[str, Any] | None = None,
        written: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.keep, self.made_of = folder.resolve(), keep, dict(made_of or {})
        self.versions: Mapping[str, str] = {}
        self.best = self.folder / "best.pt"
        self.written = written
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, in order."""
        return sorted(step for path in self.folder.glob("step_*.pt") if (step := step_of(path.name)) is not None)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step_{step:08d}.pt"

    def save(self, step: int, state: Mapping[str, Any], best: bool = False) -> None:
        """Copy the state and write it in the background; an error of the last write is raised here."""
        self.wait()
        whole = {**state, "made_of": self.made_of, "versions": dict(self.versions)}
        self._pending = self._writer.submit(self._write, step, _to_cpu(whole), best)

    def check(self) -> None:
        """Raise the error of a write that is over, without waiting for one that is not."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when everything is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, state: dict[str, Any], best: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.folder}: {error.strerror}") from error
        buffer = BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        path = self.path(step)
        for stale in self.folder.glob("*.tmp"):  # of a run that was killed as it wrote
            stale.unlink(missing_ok=True)
        # the digest goes first, beside those of the file it may replace: at no moment does a whole one look damaged,
        # not even where the last replacement was cut short as well
        before = _digest(path).read_bytes().split() if path.exists() and _digest(path).exists() else []
        write_atomic(_digest(path), b"\n".join([digest.encode(), *before]))
        write_atomic(path, data)
        if best:
            self._link_best(step)
        for old in self.steps()[: -self.keep]:
            if self.path(old) != self.best.resolve():
                self.path(old).unlink(missing_ok=True)
                _digest(self.path(old)).unlink(missing_ok=True)
        self.written()

    def _link_best(self, step: int) -> None:
        link = self.best.with_name("best.tmp")
        link.unlink(missing_ok=True)
        link.symlink_to(self.path(step).name)
        os.replace(link, self.best)

    def rewind(self, step: int, best_step: int = 0) -> str | None:
        """Leave what a run that goes on from `step` made: later checkpoints are moved aside, and told of.

        Among them the newest by step would not be the newest by time. `best.pt` leads to `best_step` again, where the
        run was killed before it did; 0 where there is none yet.
        """
        later = [self.path(other) for other in self.steps() if other > step]
        moved = [file for path in later for file in (path, _digest(path)) if file.exists()]
        if self.best.resolve() in later:
            moved.append(self.best)
        told = None
        if moved:
            aside = next(place for n in count(1) if not (place := self.folder / f"aside_{n}").exists())
            aside.mkdir()
            for file in moved:
                os.replace(file, aside / file.name)
            names = ", ".join(path.name for path in later)
            told = f"moved into {aside}, since this run does not go on from them: {names}"
        if best_step and self.path(best_step).exists() and self.best.resolve() != self.path(best_step):
            self._link_best(best_step)
        return told

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and a warning for each newer one that is not."""
        warnings: list[str] = []
        for step in reversed(self.steps()):
            try:
                read_checkpoint(self.path(step))
                return self.path(step), warnings
            except UserError as error:
                warnings.append(f"{error}; using the one before")
        return None, warnings
