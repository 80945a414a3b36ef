"""`mgvideo benchmark index`: a clip of short and long recordings, with and without a packet index, warm and cold."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import av
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table

from mgvideo.cli import keys
from mgvideo.cli.benchmark import ResultLog, measurement_conditions, open_report, plain_table, print_report
from mgvideo.cli.build import build_sampling, require_dataset_keys
from mgvideo.cli.schema import key
from mgvideo.datasets.packet_index import PacketIndex
from mgvideo.datasets.pyav import PyAV
from mgvideo.datasets.sampling import Sampling
from mgvideo.datasets.video import VideoDataset, VideoEntry
from mgvideo.loading.requests import ClipRequest
from mgvideo.plan.formatting import format_duration
from mgvideo.plan.plan import Grid, require


@dataclass
class Keys:
    """Keys of this program, besides the keys of a run."""

    lengths: list[float] = key([10, 7200], "seconds of the recordings, made of repeated copies of one training video")
    clips: int = key(20, "clips to read of each recording in each way; the median counts", least=1)
    folder: str | None = key(None, "folder for the recordings, on the disk to measure; null: the temporary folder")
    format: str = key("table", "table or json", choices=("table", "json"))
    out: str | None = key(None, "file to write to; null: the terminal")


@dataclass
class Case:
    """A recording read in one way: for each clip milliseconds of wall-clock and of CPU, and KiB from the disk."""

    length: float
    indexed: bool
    cold: bool
    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    disk_kib: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Return the medians."""
        medians = {name: median(getattr(self, name)) for name in ("wall_ms", "cpu_ms", "disk_kib")}
        return {"length": self.length, "indexed": self.indexed, "cold": self.cold, **medians}


def read_keys(overrides: Sequence[str]) -> Keys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    options = keys.read(Keys, overrides)
    require(min(options.lengths, default=0) > 0, f"lengths={options.lengths}: give at least one, in seconds")
    return options


def run(options: Keys, cfg: DictConfig) -> None:
    """Make the recordings, read clips of the base grid from random places, and print the report."""
    require_dataset_keys(cfg)
    require(
        cfg.base.num_frames is not None, f"dataset {cfg.dataset.name}: choose another recipe, such as recipe=kinetics"
    )
    if "prepare" in cfg.dataset:
        instantiate(cfg.dataset.prepare)
    dataset = instantiate(cfg.dataset.train, decoder=PyAV())
    require(isinstance(dataset.decoder, PyAV), f"dataset {cfg.dataset.name}: frames are images, no video to decode")
    base, sampling = cfg.base, build_sampling(cfg, dataset.sampling)
    grid = Grid(base.num_frames, base.crop_size, (base.frame_stride,) * 2, tuple(base.short_side))
    cases = [
        Case(length, indexed, cold) for length in options.lengths for indexed in (False, True) for cold in (False, True)
    ]
    with (
        tempfile.TemporaryDirectory(dir=options.folder, prefix="mgvideo_") as folder,
        ResultLog(len(cases), options.out) as log,
    ):
        paths = {length: repeat_video(dataset.path(0), Path(folder), length) for length in options.lengths}
        index_file = os.path.join(folder, "index")
        for path in paths.values():
            PyAV(indexes={"/": PacketIndex(index_file)}).open(path).close()
        conditions = {
            **measurement_conditions(),
            "clip": f"{grid.name}, stride {base.frame_stride}",
            "clips": options.clips,
            "index_kib": round(os.path.getsize(index_file) / 1024),
        }
        for case in cases:
            measure(case, paths[case.length], index_file, grid, sampling, options.clips)
            row = case.row()
            log(f"{_name(case)}: {row['wall_ms']:.1f} ms, CPU {row['cpu_ms']:.1f} ms, {row['disk_kib']:.0f} KiB")
        with open_report(options.out) as file:
            if options.format == "json":
                rows = [case.row() for case in cases]
                print(
                    json.dumps({"conditions": conditions, "keys": asdict(options), "rows": rows}, indent=1), file=file
                )
            else:
                print_report(file, conditions, [table(cases)])


def repeat_video(source: str, folder: Path, seconds: float) -> str:
    """Write copies of a video's packets one after another until they last `seconds`; returns the new file."""
    target = folder / f"{seconds:g}s.mp4"
    with av.open(source) as original:
        stream = original.streams.video[0]
        packets = [
            (bytes(packet), packet.pts, packet.dts, packet.is_keyframe)
            for packet in original.demux(stream)
            if packet.size
        ]
        first = min(pts for _, pts, _, _ in packets)
        gap = round(1 / (stream.average_rate * stream.time_base))
        length = max(pts for _, pts, _, _ in packets) - first + gap
        copies = max(1, round(seconds / float(length * stream.time_base)))
        with av.open(str(target), "w") as output:
            copy: Any = output.add_stream_from_template(stream)
            for number in range(copies):
                for data, pts, dts, is_keyframe in packets:
                    packet: Any = av.Packet(data)
                    packet.pts, packet.dts = pts - first + number * length, dts - first + number * length
                    packet.is_keyframe, packet.stream, packet.time_base = is_keyframe, copy, stream.time_base
                    output.mux(packet)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())  # the cache drops only pages that are on the disk
    return str(target)


def measure(case: Case, path: str, index_file: str, grid: Grid, sampling: Sampling, clips: int) -> None:
    """Read clips from random places of a recording; the first one warms up and does not count."""
    for seed in range(clips + 1):
        index = PacketIndex(index_file)  # a new mapping: mapped pages stay in the cache
        decoder = PyAV(indexes={"/": index} if case.indexed else {})
        dataset = VideoDataset("", [VideoEntry(path, 0)], ["class"], decoder, sampling)
        if case.cold:
            drop_from_cache(path, index_file)
        wall, cpu, disk = time.perf_counter(), time.process_time(), _disk_bytes()
        _ = dataset[ClipRequest(0, grid, seed)]
        if seed:
            case.wall_ms.append(1000 * (time.perf_counter() - wall))
            case.cpu_ms.append(1000 * (time.process_time() - cpu))
            case.disk_kib.append((_disk_bytes() - disk) / 1024)


def drop_from_cache(*paths: str) -> None:
    """Remove the pages of files from the page cache."""
    for path in paths:
        with closing(os.fdopen(os.open(path, os.O_RDONLY), "rb")) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _disk_bytes() -> int:
    """Return the bytes that this process has read from disks; 0 where the system does not count them."""
    with suppress(OSError), open("/proc/self/io", encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("read_bytes:")), 0)
    return 0


def _name(case: Case) -> str:
    index, cache = ("index" if case.indexed else "no index"), ("cold" if case.cold else "warm")
    return f"{format_duration(case.length)}, {index}, {cache}"


def table(cases: Sequence[Case]) -> Table:
    """Return a table with a row for each case."""
    report = plain_table("", "recording, index, page cache", "ms a clip", "CPU ms", "KiB from disk")
    for case in cases:
        row = case.row()
        report.add_row(_name(case), f"{row['wall_ms']:.1f}", f"{row['cpu_ms']:.1f}", f"{row['disk_kib']:.0f}")
    return report
