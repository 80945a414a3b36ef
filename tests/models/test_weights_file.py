"""Weights files with a trainer's objects, in old formats, compressed, cut short, and files of other kinds."""

from __future__ import annotations

import argparse
import bz2
import collections
import datetime
import enum
import functools
import gzip
import io
import lzma
import os
import pathlib
import pickle
import subprocess
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from mgvideo.errors import UserError
from mgvideo.models.pretrained import load_pretrained
from mgvideo.models.small import r2plus1d_small
from mgvideo.models.weights_file import read_weights


def network() -> nn.Module:
    return r2plus1d_small(5, width=4)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return network().state_dict()


class Mode(enum.Enum):
    """An enum of a trainer."""

    TRAIN = 1


class Settings(dict):
    """A dict subclass of a trainer."""


class Meter:
    """An object with slots."""

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 3


class Wrapper(nn.Module):
    """A trainer's module with a network inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss = network(), nn.CrossEntropyLoss(weight=torch.ones(5))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


OBJECTS = {
    "argparse.Namespace": argparse.Namespace(lr=0.1, path=pathlib.Path("/d")),
    "omegaconf": OmegaConf.create({"a": {"b": [1, "${a.c}"], "c": 2}}),
    "numpy scalar": np.float64(76.1),
    "numpy dtype": np.dtype("float32"),
    "random state": np.random.RandomState(0),
    "path": pathlib.PurePosixPath("/d"),
    "enum": Mode.TRAIN,
    "dict subclass": Settings(a=1),
    "slots": Meter(),
    "date": datetime.datetime(2026, 1, 1),
    "deque": collections.deque([1, 2]),
    "defaultdict": collections.defaultdict(list, {1: [2]}),
    "namespace": types.SimpleNamespace(a=1),
    "partial": functools.partial(max, 1),
    "function": nn.functional.relu,
    "class": nn.Conv3d,
    "device": torch.device("cpu"),
    "optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
    "module": nn.Linear(2, 2),
    "range": {"r": range(3), "s": {1, 2}, "c": 1j, "b": bytearray(b"x"), "l": slice(1, 2)},
}
WRITERS: dict[str, Callable[[object, Path], None]] = {
    "torch": torch.save,
    "torch before 1.6": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "torch, protocol 4": functools.partial(torch.save, pickle_protocol=4),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "pickle, protocol 2": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
}


def assert_loads(path: Path, state: dict[str, Tensor]) -> str:
    model = network()
    summary = load_pretrained(model, path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    return summary


@pytest.mark.parametrize("writer", WRITERS)
def test_objects_of_a_trainer_are_skipped(writer: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    for name, value in OBJECTS.items():
        WRITERS[writer]({"state_dict": state, "more": {"deep": [value]}}, tmp_path / "model.pth")
        assert_loads(tmp_path / "model.pth", state)
        if name == "argparse.Namespace":
            summary = load_pretrained(network(), tmp_path / "model.pth")
            assert summary.endswith("under state_dict, with names of mgvideo; not read: objects of argparse.Namespace")


@pytest.mark.parametrize("writer", WRITERS)
def test_whole_networks_and_dict_subclasses_are_read(writer: str, tmp_path: Path) -> None:
    trainer = Wrapper()
    for content in (trainer, {"model": nn.DataParallel(trainer)}, Settings(model=Settings(trainer.state_dict()))):
        WRITERS[writer](content, tmp_path / "model.pth")
        summary = assert_loads(tmp_path / "model.pth", trainer.net.state_dict())
        assert "loss" in summary
        assert "scratch" not in summary


def test_objects_of_other_classes_become_placeholders(tmp_path: Path) -> None:
    torch.save({"args": OBJECTS["argparse.Namespace"], "mode": Mode.TRAIN, "epoch": 3}, tmp_path / "model.pth")
    content = read_weights(tmp_path / "model.pth")
    assert not isinstance(content["args"], argparse.Namespace)
    assert not isinstance(content["mode"], Mode)
    assert content["args"].as_dict()["lr"] == 0.1
    with pytest.raises(UserError) as error:
        load_pretrained(network(), tmp_path / "model.pth")
    message = str(error.value)
    assert "contains no weights: it is of type dict and contains args (argparse.Namespace), mode (" in message
    assert message.endswith(", epoch (int)")
    assert "\x1b" not in message
    assert "\n" not in message


class Call:
    """Pickles as a call of a function, as malicious files do."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


MALICIOUS = {
    "posix.system": (os.system, "touch ran"),
    "builtins.eval": (eval, "open('ran', 'w')"),
    "builtins.exec": (exec, "open('ran', 'w')"),
    "subprocess.run": (subprocess.run, ["touch", "ran"]),
    "builtins.getattr": (getattr, "a", "upper"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("named", MALICIOUS)
def test_code_is_not_run_and_named_in_the_error(
    named: str, writer: str, state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    WRITERS[writer]({"state_dict": state, "evil": Call(*MALICIOUS[named])}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=rf"contains code, {named}, which was not run") as error:
        load_pretrained(network(), "model.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_unknown_function_is_not_called(tmp_path: Path, state: dict[str, Tensor]) -> None:
    ran = tmp_path / "ran"
    torch.save({"state_dict": state, "evil": Call(_touch, str(ran))}, tmp_path / "model.pth")
    assert_loads(tmp_path / "model.pth", state)
    assert not ran.exists()


def _touch(path: str) -> None:
    Path(path).touch()


def test_pickle_cannot_change_a_class(tmp_path: Path) -> None:
    # GLOBAL torch.nn.parameter.Parameter, state (None, {"changed": 1}), BUILD
    data = b"\x80\x02ctorch.nn.parameter\nParameter\nN}X\x07\x00\x00\x00changedK\x01s\x86b."
    (tmp_path / "model.pkl").write_bytes(data)
    with pytest.raises(UserError, match="cannot read weights"):
        read_weights(tmp_path / "model.pkl")
    assert not hasattr(nn.Parameter, "changed")


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def tarred(**members: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def saved(content: object, **options: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "model.pth.tar": bytes,  # the name in torch's examples
    "model.pth.gz": gzip.compress,
    "model.pth.bz2": bz2.compress,
    "model.pth.xz": lzma.compress,
    "model.zip": lambda raw: zipped(**{"m/model.pth": raw, "m/readme.txt": b"", "__MACOSX/m/._model.pth": b"x"}),
    "model.tar.gz": lambda raw: tarred(**{"m/model.pth": raw, "m/config.yaml": b"a: 1"}),
    "zip in gzip": lambda raw: gzip.compress(zipped(**{"model.pth": raw})),
}


@pytest.mark.parametrize("name", PACKED)
def test_compressed_files_are_read(name: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PACKED[name](saved({"model": state})))
    assert_loads(tmp_path / name, state)


def test_safetensors_and_arrays_are_read(state: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(save_safetensors(state))
    assert_loads(tmp_path / "model.safetensors", state)
    np.savez(tmp_path / "model.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    assert_loads(tmp_path / "model.npz", state)
    half = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    (tmp_path / "half.safetensors").write_bytes(save_safetensors(half))
    assert_loads(tmp_path / "half.safetensors", {name: t.to(state[name].dtype) for name, t in half.items()})


def cut(data: bytes, share: float) -> bytes:
    return data[: round(share * len(data))]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(500) + data[middle + 500 :]


OLD = {"_use_new_zipfile_serialization": False}
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Quota exceeded</title></head></html>"
DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], bytes], str]] = {
    "empty": (lambda _: b"", "it is empty"),
    "zeros": (lambda _: bytes(4000), "it contains only zeros"),
    "pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "git lfs pull"),
    "page": (lambda _: PAGE, r"a web page \(Quota exceeded\)"),
    "denied": (lambda _: DENIED, r"a web page \(Access Denied\)"),
    "json": (lambda _: b'{"error": "not found"}', "is text that begins with"),
    "hdf5": (lambda _: b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "zstd": (lambda _: b"\x28\xb5\x2f\xfd" + bytes(99), "zstd: unpack it first"),
    "noise": (lambda _: bytes(range(3, 256)) * 9, "damaged"),
    "cut": (lambda state: cut(saved(state), 0.6), "cut short at"),
    "cut, old": (lambda state: cut(saved(state, **OLD), 0.6), "cut short at"),
    "cut early, old": (lambda state: cut(saved(state, **OLD), 0.01), "cut short at"),
    "cut pickle": (lambda state: cut(pickle.dumps(state), 0.3), "cut short at"),
    "cut safetensors": (lambda state: cut(save_safetensors(state), 0.9), "cut short at"),
    "cut header": (lambda state: save_safetensors(state)[:60], "cut short at"),
    "header of other bytes": (lambda _: save_safetensors({})[:8] + b"{" + bytes(7), "damaged"),
    "float8": (
        lambda _: save_safetensors({"w": torch.ones(2).to(torch.float8_e4m3fn)}),
        "contains w as torch.float8_e4m3fn",
    ),
    "float4": (
        lambda _: save_safetensors({"w": torch.ones(3)}).replace(b'"F32","shape":[3]', b'"F4","shape":[24]'),
        "dtype F4: convert them to float32",
    ),
    "cut gzip": (lambda state: cut(gzip.compress(saved(state)), 0.9), "cut short"),
    "flipped": (lambda state: flipped(saved(state)), "does not match its checksums"),
    "several": (
        lambda state: zipped(**{"a.pth": b"x", "b.pth": b"y"}),
        "several weights files: unpack it and give one of a.pth, b.pth",
    ),
    "none": (lambda state: zipped(**{"readme.txt": b"x"}), "zip archive without weights: it contains readme.txt"),
    "old tar": (lambda state: tarred(storages=b"x", tensors=b"x", pickle=b"x"), "by torch before 0.2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unreadable_files_give_one_line_that_says_what_they_are(
    name: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    make_content, message = REFUSED[name]
    (tmp_path / "model.pth").write_bytes(make_content(state))
    with pytest.raises(UserError, match=rf"cannot read weights from .*model\.pth: .*{message}") as error:
        load_pretrained(network(), tmp_path / "model.pth")
    assert "\n" not in str(error.value)


def test_files_without_checksums_are_read(state: dict[str, Tensor], tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "model.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_loads(tmp_path / "model.pth", state)


def test_errors_for_exported_networks_contain_a_command_that_extracts_the_weights(tmp_path: Path) -> None:
    model, clips = network().eval(), torch.zeros(1, 3, 4, 32, 32)
    torch.jit.trace(model, clips).save(str(tmp_path / "script.pt"))
    torch.export.save(torch.export.export(model, (clips,)), tmp_path / "program.pt2")
    for name in ("script.pt", "program.pt2"):
        with pytest.raises(UserError) as error:
            load_pretrained(network(), tmp_path / name)
        command = str(error.value).split('"')[1].replace("weights.pth", str(tmp_path / "weights.pth"))
        exec(command, {})
        assert_loads(tmp_path / "weights.pth", model.state_dict())


def test_errors_for_folders_say_what_is_in_them(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/best.pt").touch()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/__0_0.distcp").touch()
    (tmp_path / "none").mkdir()
    for name, message in (
        ("run", "give one of its files, checkpoints/best.pt"),
        ("shards", "dcp_to_torch"),
        ("none", "without weights"),
    ):
        with pytest.raises(UserError, match=f"{name}: it is a folder.*{message}"):
            read_weights(tmp_path / name)
