"""`mgvideo export`: write a trained network to a file that runs without mgvideo, or its weights, and check them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.filesize import decimal
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mgvideo.engine.precision import Normalize
from mgvideo.errors import UserError
from mgvideo.models.mvit import MViT
from mgvideo.models.slowfast import SlowFast
from mgvideo.models.swin import Swin3D
from mgvideo.models.vit import VisionTransformer
from mgvideo.plan.plan import require
from mgvideo.storage.files import replace_when_complete
from mgvideo.storage.paths import explain_write_errors

from . import app, keys
from .hub import push_folder, require_hub, write_hub_folder, write_weights
from .schema import key
from .trained import HELP, Trained, load_trained

SUFFIXES = {".pt2": "torch", ".onnx": "onnx", ".safetensors": "safetensors"}
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4  # relative to the largest logit; runtimes sum in different orders

Runner = Callable[[Tensor], Tensor]


@dataclass
class ExportKeys:
    """Keys of this program, besides the keys of a run."""

    ckpt: str | None = key(
        None, "a checkpoint, a run's folder (best checkpoint, else newest), or weights as in init_from"
    )
    out: str | None = key(None, "file to write: NAME.pt2, NAME.onnx or NAME.safetensors; with format=hub, a folder")
    format: str | None = key(
        None,
        "torch (torch.export), onnx, safetensors (weights only) or hub (a folder for the Hugging Face Hub); null: by "
        "the suffix of out",
        choices=(*SUFFIXES.values(), "hub"),
    )
    repo: str | None = key(None, "with format=hub: upload the folder to this repository of the Hub, ORGANISATION/NAME")
    frames: int | None = key(None, "frames of a clip; null: base.num_frames of the run", least=1)
    size: int | None = key(None, "height and width of a clip; null: base.crop_size", least=1)
    batch: int = key(1, "clips in a batch", least=1)
    dynamic: bool = key(
        False,
        "accept any batch, height, width and number of frames (SlowFast: fixed frames; transformers: only any batch); "
        "the values above are examples",
    )
    normalize: bool = key(False, "accept uint8 RGB frames [n, t, h, w, 3] and include their normalisation")


@dataclass(frozen=True)
class ClipFormat:
    """Input of an exported network: uint8 `[n, t, h, w, 3]` if `raw`, else normalised float `[n, 3, t, h, w]`."""

    raw: bool

    def random(self, batch: int, frames: int, height: int, width: int) -> Tensor:
        """Return a batch of random clips in this format, the same on every call."""
        draws = torch.Generator().manual_seed(0)
        if self.raw:
            return torch.randint(0, 256, (batch, frames, height, width, 3), dtype=torch.uint8, generator=draws)
        return torch.randn(batch, 3, frames, height, width, generator=draws)

    def dims(self, any_frames: bool, any_size: bool) -> dict[int, object]:
        """Return the dynamic dimensions: batch, if `any_frames` time, and if `any_size` height and width."""
        time = 1 if self.raw else 2
        sides = [time + 1, time + 2] if any_size else []
        return dict.fromkeys([0, *([time] if any_frames else []), *sides], Dim.DYNAMIC)


class NormalizedNetwork(nn.Module):
    """A network preceded by the normalisation of its input."""

    def __init__(self, network: nn.Module, normalize: Normalize) -> None:
        super().__init__()
        self.network, self.normalize = network, normalize

    def forward(self, clips: Tensor) -> Tensor:
        """Map uint8 clips `[n, t, h, w, 3]` to logits `[n, classes]`."""
        return self.network(self.normalize(clips))


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo export` and tools/export.py."""
    if {"-h", "--help"} & set(arguments):
        print(_help())
        return
    own_overrides, run_overrides = keys.split(ExportKeys, arguments)
    with app.exit_on_user_error():
        run(read_keys(own_overrides), run_overrides)


def _help() -> str:
    lines = [
        "Write a trained network to one file that runs without mgvideo, and compare its output with the network's; or "
        "write its weights:"
    ]
    lines += ["python tools/export.py ckpt=PATH out=FILE [key=value] …", ""]
    return "\n".join([*lines, *HELP, "", *keys.describe(ExportKeys)])


def read_keys(overrides: Sequence[str]) -> ExportKeys:
    """Read and check the keys of this program, and fill in `format`. Raises UserError for an invalid value."""
    options = keys.read(ExportKeys, overrides)
    if options.out is None:
        raise UserError("out is not set: add out=NAME.pt2, .onnx or .safetensors, or format=hub out=FOLDER")
    require(options.repo is None or options.format == "hub", "repo uploads a folder: add format=hub")
    if options.format == "hub":
        require_hub()
        return options
    suffix_format = SUFFIXES.get(Path(options.out).suffix)
    require(
        suffix_format is not None,
        f"out={options.out}: name it NAME.pt2 (torch), NAME.onnx or NAME.safetensors; format=hub writes a folder",
    )
    require(
        options.format in (None, suffix_format),
        f"out={options.out}: format={options.format} requires another suffix: "
        f"{', '.join(f'{suffix} for {name}' for suffix, name in SUFFIXES.items())}",
    )
    options.format = suffix_format
    missing = [name for name in ONNX_PACKAGES if options.format == "onnx" and find_spec(name) is None]
    require(not missing, f"format=onnx requires {', '.join(missing)}: pip install {' '.join(ONNX_PACKAGES)}")
    return options


def run(options: ExportKeys, overrides: Sequence[str]) -> None:
    """Export to a temporary file, check it, and rename it to `out`. Nothing is left behind if that fails."""
    out = Path(str(options.out))
    with explain_write_errors("out", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if options.format == "hub":
            export_to_hub(options, overrides, out)
            return
        with replace_when_complete(out) as part:
            part.touch()  # fail now, not after minutes of tracing, if the folder is not writable
            if options.format == "safetensors":
                export_weights(options, overrides, part)
            else:
                export(options, overrides, part)


def export_weights(options: ExportKeys, overrides: Sequence[str], file: Path) -> None:
    """Write the tensors of the network, with mgvideo's names, as `init_from` and `ckpt` read them."""
    trained = load_trained(options.ckpt, overrides, ExportKeys)
    print(trained.load_summary)
    write_weights(trained.model, file)
    print(f"{options.out}: {decimal(file.stat().st_size)}, {trained}; read again, and equal")


def export_to_hub(options: ExportKeys, overrides: Sequence[str], folder: Path) -> None:
    """Write a folder with weights, config, class names and a model card, and upload it if `repo` is set."""
    trained = load_trained(options.ckpt, overrides, ExportKeys)
    print(trained.load_summary)
    write_hub_folder(trained, folder, options.repo)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if options.repo is not None:
        print(f"uploaded to {push_folder(folder, options.repo)}")


def export(options: ExportKeys, overrides: Sequence[str], file: Path) -> None:
    """Write the file, run it, compare its output with the network's, and print a summary."""
    trained = load_trained(options.ckpt, overrides, ExportKeys)
    cfg, clips = trained.cfg, ClipFormat(options.normalize)
    network = trained.model
    if options.normalize:
        network = NormalizedNetwork(network, Normalize(tuple(cfg.normalize.mean), tuple(cfg.normalize.std))).eval()
    any_frames, any_size = takes_any_frames(trained.model), takes_any_size(trained.model)
    frames, size = options.frames or cfg.base.num_frames, options.size or cfg.base.crop_size
    # torch.export treats a dimension of size 1 as fixed, so a dynamic batch needs an example of at least 2
    batch = max(2, options.batch) if options.dynamic else options.batch
    examples = [clips.random(batch, frames, size, size)]
    if options.dynamic:
        height, width = (size + 32, size + 16) if any_size else (size, size)
        examples.append(clips.random(1, 2 * frames if any_frames else frames, height, width))
    print(trained.load_summary)
    print(trained)
    program = trace_network(network, examples[0], clips.dims(any_frames, any_size) if options.dynamic else None)
    save, load = (save_onnx, load_onnx) if options.format == "onnx" else (save_torch, load_torch)
    save(program, str(file))
    check_output(load(str(file)), network, examples)
    print_summary(options, trained, examples[0], file.stat().st_size)


def takes_any_frames(model: nn.Module) -> bool:
    """Return whether one graph works for any number of frames. SlowFast's graph has fixed slow-pathway indices."""
    return takes_any_size(model) and not isinstance(model, SlowFast)


def takes_any_size(model: nn.Module) -> bool:
    """Return whether one graph works for any height and width. Windows, tables and padding of transformers do not."""
    return not isinstance(model, MViT | Swin3D | VisionTransformer)


def trace_network(network: nn.Module, example: Tensor, dims: dict[int, object] | None) -> ExportedProgram:
    """Trace the network into a graph. Raises UserError if torch.export cannot, with these dynamic dimensions."""
    try:
        # strict mode turns the frame indices of the slow pathway into constants; otherwise they depend on data
        return torch.export.export(network, (example,), dynamic_shapes=(dims,) if dims else None, strict=True)
    except Exception as error:  # torch.export raises many types_network
        raise UserError(f"torch.export cannot trace this network: {str(error).strip().splitlines()[0]}") from error


def save_torch(program: ExportedProgram, file: str) -> None:
    """Write a graph in torch.export's format."""
    with open(file, "wb") as target:  # given a path, torch reports an unwritable file as an internal error
        torch.export.save(program, target)


def load_torch(file: str) -> Runner:
    """Load a program of torch.export as a callable."""
    return torch.export.load(file).module()


def save_onnx(program: ExportedProgram, file: str) -> None:
    """Write a graph as one ONNX file with the input `clips` and the output `logits`."""
    # ONNX has no attention without heads, so decompose it into matrix products and a softmax
    decomposed = program.run_decompositions()
    names = {"input_names": ["clips"], "output_names": ["logits"]}
    torch.onnx.export(decomposed, f=file, dynamo=True, verbose=False, external_data=False, **names)  # type: ignore[arg-type]


def load_onnx(file: str) -> Runner:
    """Load an ONNX file in onnxruntime as a callable, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0])


def check_output(program: Runner, network: nn.Module, examples: Sequence[Tensor]) -> None:
    """Compare the program with the network on each example. Raises UserError if logits differ by over `TOLERANCE`."""
    for clips in examples:
        with torch.no_grad():
            expected, exported = network(clips), program(clips)
        largest, difference = expected.abs().max().item(), (exported - expected).abs().max().item()
        allowed = TOLERANCE * max(1.0, largest)
        result = f"logits up to {largest:.2f} differ by {difference:.1e}, at most {allowed:.1e} allowed"
        print(f"check on {list(clips.shape)}: {result}")
        require(difference <= allowed, "logits of the exported network differ from the network's: nothing was written")


def print_summary(options: ExportKeys, trained: Trained, example: Tensor, size: int) -> None:
    """Print the input and output of the file, and which dimension is fixed."""
    cfg, shape = trained.cfg, [str(side) for side in example.shape]
    any_frames, any_size = takes_any_frames(trained.model), takes_any_size(trained.model)
    if options.dynamic:
        names = ["n", "t", "h", "w", "3"] if options.normalize else ["n", "3", "t", "h", "w"]
        fixed = ([] if any_frames else ["t"]) + ([] if any_size else ["h", "w"])
        shape = [side if name in fixed else name for name, side in zip(names, shape, strict=True)]
    mean, std = list(cfg.normalize.mean), list(cfg.normalize.std)
    pixels = "uint8 RGB" if options.normalize else f"float32 RGB in 0–1, minus mean {mean}, divided by std {std}"
    scores = "softmax" if cfg.dataset.task == "single_label" else "sigmoid"
    print(f"{options.out}: {decimal(size)}")
    print(f"  input clips [{', '.join(shape)}]: {pixels}; frames at stride {cfg.base.frame_stride}")
    print(f"  output logits [{shape[0]}, {trained.classes}], before the {scores}")
    if options.dynamic and not any_size:
        print("  the size of a clip is fixed, because the graph holds the positions of a transformer for one grid")
    elif options.dynamic and not any_frames:
        print("  the number of frames is fixed, because export fixes the frame indices of SlowFast's slow pathway")
