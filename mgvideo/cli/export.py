"""`mgvideo export`: a trained network as a file that runs without this package, checked against the network itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mgvideo.engine.precision import Normalize
from mgvideo.errors import UserError
from mgvideo.models.slowfast import SlowFast
from mgvideo.plan.plan import require
from mgvideo.storage.paths import explain_write_errors

from . import app, keys
from .schema import key
from .trained import HELP, Trained, load_trained

SUFFIXES = {".pt2": "torch", ".onnx": "onnx"}
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4  # of the largest logit; libraries add up in another order

Runner = Callable[[Tensor], Tensor]


@dataclass
class ExportKeys:
    """What this program takes besides the keys of a run."""

    ckpt: str | None = key(
        None, "a checkpoint, a run's folder (its best one, else its newest), or weights as init_from"
    )
    out: str | None = key(None, "file to write: NAME.pt2 or NAME.onnx")
    format: str | None = key(None, "torch (torch.export) or onnx; null: what the file's name ends in says")
    frames: int | None = key(None, "frames of a clip; null: base.num_frames of the run")
    size: int | None = key(None, "height and width of a clip; null: base.crop_size")
    batch: int = key(1, "clips at once")
    dynamic: bool = key(
        False, "take any number of clips, of frames (not SlowFast) and of pixels; those above are an example"
    )
    normalize: bool = key(False, "take uint8 RGB frames [n, t, h, w, 3] and normalise them inside")


@dataclass(frozen=True)
class Clips:
    """Which clips a program takes: uint8 `[n, t, h, w, 3]`, or float `[n, 3, t, h, w]` where they come normalised."""

    raw: bool

    def random(self, batch: int, frames: int, height: int, width: int) -> Tensor:
        """Such clips, of noise."""
        draws = torch.Generator().manual_seed(0)
        if self.raw:
            return torch.randint(0, 256, (batch, frames, height, width, 3), dtype=torch.uint8, generator=draws)
        return torch.randn(batch, 3, frames, height, width, generator=draws)

    def dims(self, any_frames: bool) -> dict[int, object]:
        """The dimensions that may vary: those of batch, height and width, and of time where `any_frames`."""
        time = 1 if self.raw else 2
        return dict.fromkeys([0, *([time] if any_frames else []), time + 1, time + 2], Dim.DYNAMIC)


class FromPixels(nn.Module):
    """A network behind its normalisation."""

    def __init__(self, network: nn.Module, normalize: Normalize) -> None:
        super().__init__()
        self.network, self.normalize = network, normalize

    def forward(self, clips: Tensor) -> Tensor:
        """uint8 `[n, t, h, w, 3]` → logits `[n, classes]`."""
        return self.network(self.normalize(clips))


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo export` and tools/export.py."""
    if {"-h", "--help"} & set(arguments):
        print(_help())
        return
    own, rest = keys.split(ExportKeys, arguments)
    with app.exit_on_user_error():
        run(read_keys(own), rest)


def _help() -> str:
    lines = [
        "Write a trained network as one file that needs nothing of mgvideo, and check it against the network itself:"
    ]
    lines += ["python tools/export.py ckpt=PATH out=FILE [key=value] …", ""]
    return "\n".join([*lines, *HELP, "", *keys.describe(ExportKeys)])


def read_keys(overrides: Sequence[str]) -> ExportKeys:
    """This program's own keys, `format` filled in. Raises UserError where a value is of no use."""
    given = keys.read(ExportKeys, overrides)
    if given.out is None:
        raise UserError("out is not set: add out=NAME.pt2 or out=NAME.onnx to the command")
    told = SUFFIXES.get(Path(given.out).suffix)
    require(given.format in (None, *SUFFIXES.values()), f"format={given.format}: choose torch or onnx")
    require(told is not None, f"out={given.out}: name it NAME.pt2 (torch) or NAME.onnx")
    require(given.format in (None, told), f"out={given.out}: format={given.format} ends in another suffix")
    given.format = told
    for name in ("frames", "size", "batch"):
        value = getattr(given, name)
        require(value is None or value >= 1, f"{name}={value}: give a whole number from 1 up")
    missing = [name for name in ONNX_PACKAGES if given.format == "onnx" and find_spec(name) is None]
    require(not missing, f"format=onnx needs {', '.join(missing)}: pip install {' '.join(ONNX_PACKAGES)}")
    return given


def run(given: ExportKeys, overrides: Sequence[str]) -> None:
    """Export, check and say what the file takes."""
    out = Path(str(given.out))
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    try:
        with explain_write_errors("out", out):
            out.parent.mkdir(parents=True, exist_ok=True)
            part.touch()  # before minutes are spent on what cannot be written
            export(given, overrides, part)
            part.replace(out)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def export(given: ExportKeys, overrides: Sequence[str], file: Path) -> None:
    """Write the file, run it and compare it with the network."""
    trained = load_trained(given.ckpt, overrides, ExportKeys)
    cfg, clips = trained.cfg, Clips(given.normalize)
    network = trained.model
    if given.normalize:
        network = FromPixels(network, Normalize(tuple(cfg.normalize.mean), tuple(cfg.normalize.std))).eval()
    any_frames = takes_any_frames(trained.model)
    frames, size = given.frames or cfg.base.num_frames, given.size or cfg.base.crop_size
    # with one of something a program would be for one of it alone
    batch = max(2, given.batch) if given.dynamic else given.batch
    examples = [clips.random(batch, frames, size, size)]
    if given.dynamic:
        examples.append(clips.random(1, 2 * frames if any_frames else frames, size + 32, size + 16))
    print(trained.taken)
    print(trained)
    program = trace(network, examples[0], clips.dims(any_frames) if given.dynamic else None)
    save, load = (save_onnx, load_onnx) if given.format == "onnx" else (save_torch, load_torch)
    save(program, str(file))
    check(load(str(file)), network, examples)
    describe(given, trained, examples[0], file.stat().st_size)


def takes_any_frames(model: nn.Module) -> bool:
    """Whether one graph serves every number of frames. SlowFast's names the frames of its slow pathway."""
    return not isinstance(model, SlowFast)


def trace(network: nn.Module, example: Tensor, dims: dict[int, object] | None) -> ExportedProgram:
    """The network as a graph. Raises UserError where it has none for these dimensions."""
    try:
        # strict: else the frames that a slow pathway takes would count as data, and not as a constant
        return torch.export.export(network, (example,), dynamic_shapes=(dims,) if dims else None, strict=True)
    except Exception as error:  # of many kinds, all about what torch can trace
        raise UserError(f"torch.export cannot take this network: {str(error).strip().splitlines()[0]}") from error


def save_torch(program: ExportedProgram, file: str) -> None:
    """A graph as torch.export writes it."""
    with open(file, "wb") as target:  # torch would tell of no file as of a bug
        torch.export.save(program, target)


def load_torch(file: str) -> Runner:
    """A program of torch.export, ready to run."""
    return torch.export.load(file).module()


def save_onnx(program: ExportedProgram, file: str) -> None:
    """A graph as ONNX in one file, its input `clips` and its output `logits`."""
    # attention without heads is not in ONNX: decomposed, it is products and a softmax
    plain = program.run_decompositions()
    names = {"input_names": ["clips"], "output_names": ["logits"]}
    torch.onnx.export(plain, f=file, dynamo=True, verbose=False, external_data=False, **names)  # type: ignore[arg-type]


def load_onnx(file: str) -> Runner:
    """An ONNX file in onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])


def check(program: Runner, network: nn.Module, examples: Sequence[Tensor]) -> None:
    """Compare with the network itself, on clips of each shape. Raises UserError where they differ."""
    for clips in examples:
        with torch.no_grad():
            expected, found = network(clips), program(clips)
        largest, off = expected.abs().max().item(), (found - expected).abs().max().item()
        allowed = TOLERANCE * max(1.0, largest)
        print(f"check on {list(clips.shape)}: logits up to {largest:.2f} differ by {off:.1e}, allowed is {allowed:.1e}")
        require(off <= allowed, "the exported network does not compute what the network does: nothing was written")


def describe(given: ExportKeys, trained: Trained, example: Tensor, size: int) -> None:
    """Say what the file takes and gives, and what is fixed in it."""
    cfg, shape, any_frames = trained.cfg, [str(side) for side in example.shape], takes_any_frames(trained.model)
    if given.dynamic:
        names = ["n", "t", "h", "w", "3"] if given.normalize else ["n", "3", "t", "h", "w"]
        shape = [side if name == "t" and not any_frames else name for name, side in zip(names, shape, strict=True)]
    mean, std = list(cfg.normalize.mean), list(cfg.normalize.std)
    pixels = "uint8 RGB" if given.normalize else f"float32 RGB in 0–1, less mean {mean}, over std {std}"
    scores = "softmax" if cfg.dataset.task == "single_label" else "sigmoid"
    print(f"{given.out}: {size / 1e6:.1f} MB")
    print(f"  input clips [{', '.join(shape)}]: {pixels}; frames at stride {cfg.base.frame_stride}")
    print(f"  output logits [{shape[0]}, {trained.classes}], before the {scores}")
    if given.dynamic and not any_frames:
        print("  the number of frames is fixed: SlowFast chooses its slow pathway's by it, when the file is made")
