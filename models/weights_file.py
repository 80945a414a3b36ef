"""What a file of weights holds, whatever wrote it, read without running anything in it.

Reads what `torch.save` writes and wrote, pickles, safetensors and `.npz`, also inside of gzip, bzip2, xz, tar or zip.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import pickle
import re
import tarfile
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from io import BytesIO
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import numpy as np
import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals

from mgvideo.errors import UserError
from mgvideo.storage.paths import is_remote, local

SUFFIXES = (".pth", ".pt", ".pyth", ".ckpt", ".bin", ".safetensors", ".pkl", ".npz", ".pth.tar")
COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
OTHER_KINDS = {  # how files of other kinds begin
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive: unpack it first",
    b"Rar!": "is a rar archive: unpack it first",
    b"\x89HDF": "is an HDF5 file, as Keras writes: its tensors have other names and shapes",
}
INCOMPLETE_SAFETENSORS = (  # what errors of the safetensors library contain if a file is cut short, by its version
    *("header length", "header too small", "not fully covered"),
    *("InvalidHeaderLength", "HeaderTooSmall", "MetadataIncompleteBuffer"),
)
LISTED = 8  # so many names are listed, the rest are counted


class NotWeightsError(Exception):
    """A file that holds no weights, or none that can be read; the message says what it is and what to do."""


class StandIn:
    """An object whose class is not loaded: its attributes and its items, without any of its code."""

    def __new__(cls, *_: Any, **attributes: Any) -> StandIn:
        """Keep keyword arguments; other arguments of a constructor have no names."""
        made = object.__new__(cls)
        made.__dict__.update(attributes)
        made.__dict__["items of it"] = {}
        return made

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else [state]:
            if isinstance(part, Mapping):
                self.__dict__.update({str(name): value for name, value in part.items()})

    def __setitem__(self, name: Any, value: Any) -> None:
        self.__dict__["items of it"][name] = value

    def append(self, value: Any) -> None:
        """As of a list or a set."""
        items = self.__dict__["items of it"]
        items[len(items)] = value

    add = append

    def __call__(self, *_: Any, **__: Any) -> StandIn:
        """Call nothing."""
        return StandIn()

    def contents(self) -> dict[Any, Any]:
        """Attributes and items by name; of a network, its parameters and buffers as in its state dict."""
        own = {name: value for name, value in self.__dict__.items() if name != "items of it"}
        if {"_modules", "_parameters", "_buffers"} <= own.keys():
            transient = set(own.get("_non_persistent_buffers_set") or ())
            buffers = {name: value for name, value in dict(own["_buffers"]).items() if name not in transient}
            return {**dict(own["_parameters"]), **buffers, **dict(own["_modules"])}
        return {**own, **self.__dict__["items of it"]}


def _storage(data: bytes) -> Any:
    """A tensor's memory in a plain pickle, which torch itself would read with code and all."""
    return torch.load(BytesIO(data), map_location="cpu", weights_only=True)


_ARRAY = np.empty(0).__reduce__()[0]
KNOWN: dict[str, Any] = {  # what a pickle may call besides what torch itself allows for weights
    **{f"builtins.{kind.__name__}": kind for kind in (set, frozenset, complex, bytearray, bytes, slice, range)},
    **{f"builtins.{kind.__name__}": kind for kind in (object, list, dict, tuple, int, float, str, bool)},
    "collections.defaultdict": defaultdict,
    "torch.storage._load_from_bytes": _storage,
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
    **{f"numpy.{core}.multiarray._reconstruct": _ARRAY for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": np.float32(0).__reduce__()[0] for core in ("core", "_core")},
}
CODE = {  # what is only there to be called: modules, and functions of builtins
    *(
        "os",
        "posix",
        "nt",
        "sys",
        "subprocess",
        "shutil",
        "importlib",
        "runpy",
        "pty",
        "socket",
        "ctypes",
        "webbrowser",
    ),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.open", "builtins.__import__", "builtins.getattr"),
    *("builtins.setattr", "builtins.delattr", "builtins.globals", "builtins.execfile", "builtins.apply"),
}


_PythonUnpickler: Any = pickle._Unpickler  # the one in C lets nobody look at what an instruction changes


class Unpickler(_PythonUnpickler):
    """Reads a pickle of tensors, arrays and plain values; every other object becomes a `StandIn`.

    So nothing that a file names is called. A file with names that are only there to be called is refused.
    """

    dispatch: ClassVar = dict(_PythonUnpickler.dispatch)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._classes: dict[str, type[StandIn]] = {}

    def load_build(self) -> None:
        """Set an object's state, of what is made here alone: a class or a function would be changed for good."""
        if not isinstance(self.stack[-2], StandIn | Tensor | np.ndarray | np.dtype | OrderedDict):
            raise pickle.UnpicklingError(f"it changes a {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        """One of the few that weights are made with, or a stand-in."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # since Python 2
        full = f"{module}.{name}"
        known = KNOWN.get(full, _get_allowed_globals().get(full))
        if known is not None:
            return known
        is_method = "." in name and not name.rpartition(".")[2][:1].isupper()
        if {full, module.partition(".")[0]} & CODE or is_method:
            raise NotWeightsError(
                f"holds code, {full}, of which nothing was run: if you trust it, read it with "
                "torch.load(…, weights_only=False) and torch.save its state dict alone"
            )
        if full not in self._classes:
            self._classes[full] = type(name, (StandIn,), {"__module__": module})
        return self._classes[full]


_PICKLE = SimpleNamespace(__name__="pickle", Unpickler=Unpickler, load=lambda file, **kw: Unpickler(file, **kw).load())


def read_weights(path: str | PathLike[str]) -> Any:
    """What a file of weights holds, a URL, or torchvision's weights of this name.

    Tensors are on the CPU; objects of classes other than tensors, arrays and plain values are `StandIn`s.

    Raises:
        UserError: no such file, or one that holds no weights or code. The message says what it is and what to do.
    """
    copy = ""
    try:
        if re.fullmatch(r"\w+_Weights\.\w+", str(path)):
            return torchvision.models.get_weight(str(path)).get_state_dict(progress=False, check_hash=True)
        file = local(path)
        copy = f"; the copy kept of it is {file}" if is_remote(path) else ""
        if os.path.isdir(file):
            raise NotWeightsError(_folder(Path(file)))
        with open(file, "rb") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about old formats
            return _content(opened)
    except NotWeightsError as error:
        reason = str(error).replace("FILE", str(path))
        raise UserError(f"cannot read weights from {path}: it {reason}{copy}") from error
    except OSError as error:
        raise UserError(f"cannot read weights from {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make an unpickler raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot read weights from {path}: it is damaged or no file of weights{copy}: {reason}"
        ) from error


def _content(file: IO[bytes], depth: int = 0) -> Any:
    """What an open file holds, by how it begins."""
    start = file.read(512)
    file.seek(0)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not start.strip(b"\0"):
        raise NotWeightsError("is empty" if not start else "holds zeros alone: was the download cut short?")
    for magic, reason in OTHER_KINDS.items():
        if start.startswith(magic):
            raise NotWeightsError(reason)
    for magic, opener in COMPRESSED.items():
        if start.startswith(magic) and depth < 3:
            with opener(file) as inner:
                return _whole(inner, depth)
    if start.startswith(b"PK"):
        if zipfile.is_zipfile(file):
            return _zip(file, depth)
        raise NotWeightsError(_cut_short(size))
    if _is_tar(file):
        return _tar(file, depth)
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header < 100_000_000:
        return _safetensors(file, size)
    if not start.startswith(b"\x80"):
        _refuse_text(start)
    return _pickled(file, size)


def _whole(inner: IO[bytes], depth: int) -> Any:
    try:
        data = inner.read()
    except EOFError as error:
        raise NotWeightsError("is cut short inside of its compression: download it again") from error
    return _content(BytesIO(data), depth + 1)


def _cut_short(size: int) -> str:
    return f"is cut short at {size:,} bytes: download or copy it again"


def _pickled(file: IO[bytes], size: int) -> Any:
    """A plain pickle, or the format of torch before 1.6, which begins with a pickle of a number."""
    file.seek(0)
    try:
        content = Unpickler(file, encoding="latin1").load()
        if content != torch.serialization.MAGIC_NUMBER:
            return content
        file.seek(0)
        return _torch(file)
    except EOFError as error:
        raise NotWeightsError(_cut_short(size)) from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        if any(words in str(error) for words in ("truncated", "unexpected EOF", "corrupted", "exhausted")):
            raise NotWeightsError(_cut_short(size)) from error
        raise
    except (KeyError, IndexError, ValueError) as error:  # bytes that are no instructions of a pickle
        raise NotWeightsError("is damaged, or of a kind that is not read") from error


def _torch(file: IO[bytes]) -> Any:
    """What torch.save wrote: as torch reads weights, or where they come with other objects, with these as stand-ins."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_PICKLE)


def _zip(file: IO[bytes], depth: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
        inside = {name.partition("/")[2] or name for name in names}
        if "constants.pkl" in inside:
            raise NotWeightsError(
                "is a TorchScript program: if you trust it, convert it: "
                "python -c \"import torch; torch.save(torch.jit.load('FILE').state_dict(), 'weights.pth')\""
            )
        if "data.pkl" in inside:
            return _torch_zip(file, archive)
        if any(name in inside for name in ("archive_format", "serialized_exported_program.json")):
            raise NotWeightsError(
                "is a program of torch.export: convert it: "
                "python -c \"import torch; torch.save(torch.export.load('FILE').state_dict, 'weights.pth')\""
            )
        if names and all(name.endswith(".npy") for name in names):
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        member = _only_weights(names, "zip")
        with archive.open(member) as inner:
            return _whole(inner, depth)


def _torch_zip(file: IO[bytes], archive: zipfile.ZipFile) -> Any:
    has_checksums = any(member.CRC for member in archive.infolist())  # torch itself compares none
    if has_checksums and archive.testzip() is not None:
        raise NotWeightsError("is damaged: its content does not match its checksums; download or copy it again")
    file.seek(0)
    try:
        return _torch(file)
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise NotWeightsError("is damaged: download or copy it again") from error


def _is_tar(file: IO[bytes]) -> bool:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            return bool(archive.getnames())
    except tarfile.TarError:
        return False
    finally:
        file.seek(0)


def _tar(file: IO[bytes], depth: int) -> Any:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        names = [member.name for member in archive if member.isfile()]
        if {"storages", "tensors", "pickle"} <= set(names):
            raise NotWeightsError(
                "was saved by torch before 0.2: torch.load and torch.save it with an older torch first"
            )
        inner = archive.extractfile(_only_weights(names, "tar"))
        assert inner is not None
        return _whole(inner, depth)


def _only_weights(names: list[str], kind: str) -> str:
    """The one file of weights in an archive."""
    found = [name for name in names if name.lower().endswith(SUFFIXES)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NotWeightsError(f"is a {kind} archive without weights: it holds {_listed(names)}")
    raise NotWeightsError(f"is a {kind} archive of several: unpack it and give one of {_listed(found)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}" if names else "nothing"


def _safetensors(file: IO[bytes], size: int) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name."""
    file.seek(0)
    try:
        tensors = safetensors.torch.load(file.read())
    except KeyError as error:  # the library knows dtypes that torch lacks
        raise NotWeightsError(f"holds tensors of dtype {error.args[0]}: convert them to float32") from error
    except SafetensorError as error:
        if any(text in str(error) for text in INCOMPLETE_SAFETENSORS):
            raise NotWeightsError(_cut_short(size)) from error
        raise
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:  # the scale of a float8 tensor lies elsewhere
            raise NotWeightsError(f"holds {name} as {tensor.dtype}: convert it to float32")
    return tensors


def _refuse_text(start: bytes) -> None:
    """Raise where a file is text: a web page, a pointer to the file itself, or something else."""
    text = start.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    lower = text.lower()
    if lower.startswith("version https://git-lfs"):
        raise NotWeightsError("is a pointer of git-LFS and not the file itself: run git lfs pull where it comes from")
    if lower.startswith(("<!doctype", "<html", "<?xml", "<head", "<!--")) or "<html" in lower:
        title = re.search(r"<(?:title|message)>\s*([^<]*)", text, re.IGNORECASE)
        named = f" ({title[1].strip()[:60]})" if title else ""
        raise NotWeightsError(f"is a web page{named} and not the file itself: download it from the link to the file")
    readable = sum(char.isprintable() or char in "\r\n\t" for char in text)
    if readable == len(text) and "\ufffd" not in text[:-4] and not re.match(r"\(?[dl]p\d|\([a-z]|c[\w.]+\n", text):
        raise NotWeightsError(f"is text that begins with {text.splitlines()[0][:40]!r}, and no file of weights")


def _folder(folder: Path) -> str:
    """What to do with a folder."""
    if any(folder.glob("*.distcp")):
        return (
            "is a folder of torch.distributed.checkpoint: convert it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth"
        )
    files = sorted(str(file.relative_to(folder)) for place in ("*", "*/*") for file in folder.glob(place))
    found = [file for file in files if file.lower().endswith(SUFFIXES)]
    if not found:
        return "is a folder without weights in it: give a file"
    return f"is a folder: give one of its files, {_listed(found)}"
