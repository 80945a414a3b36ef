"""Programs on terminals without Unicode, with closed pipes, and at Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from training import KNOBS, ROOT, TINY

from mgvideo.cli import PROGRAMS
from mgvideo.cli.terminal import ENCODING_ERRORS, terminal
from mgvideo.datasets.motion import make_motion
from mgvideo.models.small import r2plus1d_small

# These imitate LC_ALL=en_US.ISO-8859-1 and an ASCII locale, which not every machine has.
ENCODINGS = {"latin": {"PYTHONIOENCODING": "iso-8859-1"}, "ascii": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}}
PRINT_ALL_HELP = "from mgvideo.cli import PROGRAMS, main\nmain(['--help'])\nfor p in PROGRAMS: main([p, '--help'])"


def environment(**more: str) -> dict[str, str]:
    unchanged = {name: text for name, text in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    return {**unchanged, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "0", **more}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.slow
def test_all_help_texts_print_in_any_encoding(encoding: str) -> None:
    command = [sys.executable, "-c", PRINT_ALL_HELP]
    result = subprocess.run(command, env=environment(**ENCODINGS[encoding]), capture_output=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    text = result.stdout.decode("iso-8859-1")
    assert all(f"mgvideo {name}" in text for name in PROGRAMS)
    assert "tools/run_net.py --multirun" not in text
    assert "[group=option] [key=value] ..." in text


@pytest.mark.slow
def test_run_prints_ascii_and_writes_utf_8_files(tmp_path: Path) -> None:
    classes = ("прыжок", "走る", "été")
    make_motion(str(tmp_path / "motion"), KNOBS)
    videos = sorted((tmp_path / "motion").rglob("train/*.mp4"))
    for i, video in enumerate(videos[:60]):
        folder = tmp_path / "vidéos" / classes[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        os.link(video, folder / f"{i}é.mp4")
    (tmp_path / "vidéos" / classes[0] / "плохое.mp4").write_text("not a video")
    tiny = [word for word in TINY if "knobs" not in word]
    run = [*tiny, "dataset=folder", f"dataset.root={tmp_path}/vidéos", f"output_dir={tmp_path}/aus=gabe ×"]
    run += ["schedule=baseline", "base.epochs=2", "base.lr_milestones=[]"]
    command = [os.fsencode(word) for word in (sys.executable, str(ROOT / "tools/run_net.py"), *run)]
    result = subprocess.run(command, env=environment(**ENCODINGS["ascii"]), capture_output=True, timeout=240)
    assert result.returncode == 0, result.stderr
    printed = result.stdout.decode("ascii", "surrogateescape")
    assert "32^2" in printed
    assert "top1 **" in printed
    out = tmp_path / "aus=gabe ×"
    assert (out / "classes.txt").read_text(encoding="utf-8").splitlines() == sorted(classes)
    assert "плохое.mp4" in (out / "bad_videos.csv").read_text(encoding="utf-8")
    for name in ("config.yaml", "report.md", "report.json", "plan.json", "metrics.jsonl", "test.json"):
        (out / name).read_text(encoding="utf-8")


def test_unencodable_characters_are_replaced_and_bytes_of_file_names_stay() -> None:
    text = "8×45² → 3.3× · 50 % … é 走 \udcff"
    with terminal():
        assert text.encode("ascii", ENCODING_ERRORS) == rb"8x45^2 -> 3.3x - 50 % ... \xe9 \u8d70 " + b"\xff"
        assert text.encode("latin-1", ENCODING_ERRORS) == "8×45² -> 3.3× · 50 % ... é \\u8d70 ÿ".encode("latin-1")
        assert text.encode("utf-8", ENCODING_ERRORS) == text.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plan", "videos=64"], ["run", "--cfg", "job"]])
def test_closed_pipe_ends_a_program_quietly(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mgvideo.cli", *arguments]
    result = subprocess.run(command, env=environment(), stdout=write, stderr=subprocess.PIPE, timeout=240)
    os.close(write)
    assert result.stderr == b""
    assert result.returncode in (128 + signal.SIGPIPE, 1), "rich, which prints tables, exits with 1"


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_handles_closed_pipes(tool: str) -> None:
    text = (ROOT / "tools" / tool).read_text()
    assert "command(" in text or "with terminal():" in text


def test_broken_pipe_to_another_process_is_raised() -> None:
    with pytest.raises(BrokenPipeError), terminal():
        raise BrokenPipeError


def stop(process: subprocess.Popen, is_working: Callable[[], bool]) -> tuple[int, str]:
    """Send Ctrl-C once the program is working; return its exit code and its last line on stderr."""
    deadline = time.monotonic() + 120
    while not is_working():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    try:
        errors = process.communicate(timeout=120)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in errors, errors
    return process.returncode, errors.splitlines()[-1]


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "mgvideo.cli", *map(str, arguments)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)


def test_ctrl_c_stops_a_pool_of_processes(tmp_path: Path) -> None:
    process = start("prepare", "motion", f"dataset.root={tmp_path}", "train=3000", "processes=2")
    assert stop(process, lambda: any(tmp_path.rglob("*.mp4"))) == (128 + signal.SIGINT, "stopped by SIGINT")


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.slow
def test_ctrl_c_stops_a_prediction_as_soon_as_a_worker_exists(method: str, motion_root: str, tmp_path: Path) -> None:
    torch.save(r2plus1d_small(5, width=4).state_dict(), tmp_path / "weights.pth")
    video = next(make_motion(motion_root, KNOBS).rglob("*.mp4"))
    (tmp_path / "videos").mkdir()
    for i in range(3000):
        os.link(video, tmp_path / "videos" / f"{i}.mp4")
    network = [
        "model=r2plus1d_small",
        "model.width=4",
        "base.num_frames=8",
        "base.frame_stride=2",
        "clips=1",
        "crops=1",
    ]
    loading = ["size=32", "loader.num_workers=1", f"loader.start_method={method}"]
    process = start("predict", tmp_path / "videos", f"ckpt={tmp_path}/weights.pth", *network, *loading)

    def has_worker() -> bool:
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error):  # a program that the prediction started and that has ended
                command = " ".join(child.cmdline())
                if method == "spawn" and "spawn_main" in command:
                    return True
                if method == "forkserver" and "forkserver" in command and child.children():
                    return True
        return False

    assert stop(process, has_worker) == (128 + signal.SIGINT, "stopped by SIGINT")
