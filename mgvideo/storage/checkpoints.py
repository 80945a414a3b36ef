"""Checkpoints: written atomically in the background, and read without running code from the file."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mgvideo.errors import UserError

from .files import write_atomic
from .paths import is_remote, read_bytes

_CHECKPOINT_NAME = re.compile(r"step_(\d+)\.pt")
_NO_LOCKS_ERRORS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of file systems without locks


def checkpoint_step(name: str) -> int | None:
    """Return the step in a checkpoint's file name, None for any other file."""
    match = _CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def _to_cpu(item: Any) -> Any:
    """Return a copy on the CPU, so that training can continue while it is written."""
    if isinstance(item, torch.Tensor):
        return item.detach().to("cpu", copy=True)
    if isinstance(item, Mapping):
        return {key: _to_cpu(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(_to_cpu(value) for value in item)
    return item


def _digest_file(path: Path) -> Path:
    """Return the path of a checkpoint's SHA-256 file."""
    return path.with_suffix(".sha256")


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Lock a run's folder against a second run. The lock ends with this process at the latest.

    On a file system without locks there is none. A file that marks the folder as locked would outlive a killed run, and
    keep it from resuming on another machine.

    Raises:
        UserError: another process holds the lock.
        OSError: the folder cannot be written.
    """
    path = folder / ".lock"
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        holder = path.read_text(encoding="utf-8").strip() or "unknown"
        raise UserError(
            f"output_dir={folder} is in use by another run ({holder}): wait for it, or set another output_dir"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS_ERRORS:
            raise
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def describe_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each key that differs between two flat configs, with both values."""
    keys = sorted(saved.keys() | now.keys())
    return [
        f"{key} was {saved.get(key, 'not set')}, is {now.get(key, 'not set')}"
        for key in keys
        if saved.get(key) != now.get(key)
    ]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint, a file or a URL; its tensors are on the CPU.

    Raises:
        UserError: the file does not exist, does not match its checksum, or contains pickled code.
    """
    try:
        if not is_remote(path):
            path = Path(path).resolve()  # best.pt is a symlink, and its checksum lies beside the target
        data = read_bytes(path)
        expected = read_bytes(re.sub(r"\.pt$", ".sha256", str(path))).split() if str(path).endswith(".pt") else None
    except OSError as error:
        raise UserError(f"cannot read checkpoint {error.filename or path}: {error.strerror}") from error
    not_a_checkpoint = f"{path} is no checkpoint of a run: use init_from=… to start from its weights, not resume"
    if expected is None:
        raise UserError(not_a_checkpoint)
    if hashlib.sha256(data).hexdigest().encode() not in expected:
        raise UserError(f"checkpoint {path} is damaged: its content does not match its checksum")
    try:
        state = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path} contains more than tensors and plain values: it is not loaded") from error
    except Exception as error:  # the type that torch raises for a foreign file varies
        raise UserError(f"checkpoint {path} is damaged: {type(error).__name__}") from error
    if not isinstance(state, dict) or not {"made_of", "progress"} <= state.keys():
        raise UserError(not_a_checkpoint)
    return state


class Checkpoints:
    """The checkpoints in a run's folder: the newest `keep`, and the best one, to which `best.pt` is a symlink.

    Each file is `step_########.pt` with a `.sha256` beside it. Its keys are those of the saved state and `made_of` and
    `versions`.

    Args:
        folder: where the checkpoints are.
        keep: number of newest checkpoints to keep.
        fingerprint: the flat config that a resumed run must share, saved under the key `made_of`.
        on_write: called after each checkpoint is written.

    The attribute `versions` holds the versions of the software that writes the checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 3,
        fingerprint: Mapping[str, Any] | None = None,
        on_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.keep, self.fingerprint = folder.resolve(), keep, dict(fingerprint or {})
        self.versions: Mapping[str, str] = {}
        self.best = self.folder / "best.pt"
        self.on_write = on_write
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write_in_progress: Future[None] | None = None

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in ascending order."""
        return sorted(
            step for path in self.folder.glob("step_*.pt") if (step := checkpoint_step(path.name)) is not None
        )

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.folder / f"step_{step:08d}.pt"

    def save(self, step: int, state: Mapping[str, Any], best: bool = False) -> None:
        """Copy the state and write it in the background. Raises the error of the previous write, if it failed."""
        self.wait()
        content = {**state, "made_of": self.fingerprint, "versions": dict(self.versions)}
        self._write_in_progress = self._writer.submit(self._write, step, _to_cpu(content), best)

    def check(self) -> None:
        """Raise the error of a finished write; does not wait for a write in progress."""
        if self._write_in_progress is not None and self._write_in_progress.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on disk. Raises the error of the write."""
        write, self._write_in_progress = self._write_in_progress, None
        if write is not None:
            write.result()

    def _write(self, step: int, state: dict[str, Any], best: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {self.folder}: {error.strerror}") from error
        buffer = BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        path = self.path(step)
        for stale in self.folder.glob("*.tmp"):  # left by a run that was killed while it wrote
            stale.unlink(missing_ok=True)
        # Write the new digest first, and keep the digests of the file that it replaces: so a complete file never looks
        # damaged, even if this replacement and the one before were both interrupted.
        old_digests = _digest_file(path).read_bytes().split() if path.exists() and _digest_file(path).exists() else []
        write_atomic(_digest_file(path), b"\n".join([digest.encode(), *old_digests]))
        write_atomic(path, data)
        if best:
            self._link_best(step)
        for old in self.steps()[: -self.keep]:
            if self.path(old) != self.best.resolve():
                self.path(old).unlink(missing_ok=True)
                _digest_file(self.path(old)).unlink(missing_ok=True)
        self.on_write()

    def _link_best(self, step: int) -> None:
        link = self.best.with_name("best.tmp")
        link.unlink(missing_ok=True)
        link.symlink_to(self.path(step).name)
        os.replace(link, self.best)

    def archive_newer(self, step: int, best_step: int = 0) -> str | None:
        """Move checkpoints after `step` into a subfolder `aside_N`, before a run resumes from `step`.

        Otherwise the newest checkpoint by step would not be the newest by time. Also restores the link `best.pt` to
        `best_step` (0: no best checkpoint yet), in case the run was killed before it set the link.

        Returns:
            A message with the files that were moved, None if there were none.
        """
        later = [self.path(other) for other in self.steps() if other > step]
        moved = [file for path in later for file in (path, _digest_file(path)) if file.exists()]
        if self.best.resolve() in later:
            moved.append(self.best)
        message = None
        if moved:
            aside = next(path for n in count(1) if not (path := self.folder / f"aside_{n}").exists())
            aside.mkdir()
            for file in moved:
                os.replace(file, aside / file.name)
            names = ", ".join(path.name for path in later)
            message = f"moved into {aside}, since this run does not resume from them: {names}"
        if best_step and self.path(best_step).exists() and self.best.resolve() != self.path(best_step):
            self._link_best(best_step)
        return message

    def find_newest(self) -> tuple[Path | None, list[str]]:
        """Return the newest undamaged checkpoint (None: there is none), and a warning for each newer, damaged one."""
        warnings: list[str] = []
        for step in reversed(self.steps()):
            try:
                read_checkpoint(self.path(step))
                return self.path(step), warnings
            except UserError as error:
                warnings.append(f"{error}; using the checkpoint before it")
        return None, warnings
