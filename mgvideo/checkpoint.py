"""Checkpoints: written whole or not at all, off the training step's path, and read without running code from them."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

_NAME = re.compile(r"step_(\d+)\.pt")


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
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; what was written before it is intact") from error


def _digest(path: Path) -> Path:
    return path.with_suffix(".sha256")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, tensors on the CPU.

    Raises:
        UserError: no such file, one that is not what was written, or one with code in it.
    """
    try:
        path = path.resolve()  # best.pt is a link
        data = path.read_bytes()
        expected = _digest(path).read_text().strip()
    except OSError as error:
        raise UserError(f"cannot read checkpoint {error.filename}: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise UserError(f"checkpoint {path} is damaged: its content does not match its checksum")
    try:
        return torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path} holds more than tensors and plain values: it was not read") from error


class Checkpoints:
    """The checkpoints of a run: the newest `keep`, and the best, which `best.pt` links to."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = folder.resolve(), keep
        self.best = self.folder / "best.pt"
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, in order."""
        return sorted(int(m[1]) for path in self.folder.glob("step_*.pt") if (m := _NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step_{step:08d}.pt"

    def save(self, step: int, state: Mapping[str, Any], best: bool = False) -> None:
        """Copy the state and write it in the background; an error of the last write is raised here."""
        self.wait()
        self._pending = self._writer.submit(self._write, step, _to_cpu(state), best)

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
        digest = hashlib.sha256(data).hexdigest().encode()
        path = self.path(step)
        # the digest goes first: a checkpoint without one would look damaged
        write_atomic(_digest(path), digest)
        write_atomic(path, data)
        if best:
            link = self.best.with_name("best.tmp")
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            os.replace(link, self.best)
        for old in self.steps()[: -self.keep]:
            if self.path(old) != self.best.resolve():
                self.path(old).unlink(missing_ok=True)
                _digest(self.path(old)).unlink(missing_ok=True)

    def newest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest checkpoint that is whole, and a warning for each newer one that is not."""
        warnings: list[str] = []
        for step in reversed(self.steps()):
            try:
                return read_checkpoint(self.path(step)), warnings
            except UserError as error:
                warnings.append(f"{error}; using the one before")
        return None, warnings
