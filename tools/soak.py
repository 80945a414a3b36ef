"""Kill a run at random times until it finishes, and compare it with an undisturbed run:

    python tools/soak.py --kills 10 --every 60 --bad 0.01 base.epochs=40

Runs the same arguments (of tools/run_net.py) twice on this machine, in --folder: once undisturbed, and once with
--kills SIGKILLs, each at a time drawn uniformly from [0, 2·every] seconds after a start. Reports steps and weights that
differ, memory, and processes left behind. Exits with 1 if the results differ or a process outlives a kill. With --bad,
both runs read a copy of Motion in --folder in which that share of the videos is truncated to half its bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import torch

from mgvideo.cli.terminal import terminal
from mgvideo.storage.checkpoints import Checkpoints, read_checkpoint

PROGRAM = Path(__file__).with_name("run_net.py")
PREPARE = Path(__file__).with_name("prepare_data.py")


def make_bad_videos(root: Path, share: float, seed: int, overrides: Sequence[str]) -> int:
    """Make Motion at `root`, unless it exists, and truncate a share of its videos to half.

    Returns the number of truncated videos.
    """
    if not root.exists():
        knobs = [argument for argument in overrides if argument.startswith("dataset.")]
        subprocess.run([sys.executable, str(PREPARE), "motion", *knobs, f"dataset.root={root}"], check=True)
    videos = sorted(root.rglob("*.mp4"))
    chosen = random.Random(seed).sample(videos, round(share * len(videos)))
    for video in chosen:
        video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    return len(chosen)


def run_program(arguments: Sequence[str], log: Path, limit_s: float | None = None) -> tuple[int | None, float, int]:
    """Run to the end, or kill the run after `limit_s` seconds.

    Returns:
        Exit code (None: killed), peak memory of the training process (MiB), and number of child processes that are
        still alive 30 seconds after the kill.
    """
    peak, start = 0.0, time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        process = psutil.Popen([sys.executable, str(PROGRAM), *arguments], stdout=file, stderr=subprocess.STDOUT)
    while process.poll() is None:
        if limit_s is not None and time.monotonic() - start > limit_s:
            children = process.children(recursive=True)
            process.kill()
            process.wait()
            return None, peak, len(psutil.wait_procs(children, timeout=30)[1])
        try:
            peak = max(peak, process.memory_info().rss / 2**20)
        except psutil.Error:
            break
        time.sleep(0.1)
    return process.wait(), peak, 0


def logged_steps(folder: Path) -> list[dict[str, Any]]:
    """Return the records of training steps in metrics.jsonl, in the order of the file."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def memory_over_time(folder: Path) -> tuple[float, float]:
    """Return the mean memory (MiB) of the training process in the second and the last quarter of the logged steps."""
    mib = [1024 * record["memory_gib"] for record in logged_steps(folder)]
    quarter = max(1, len(mib) // 4)
    return mean(mib[quarter : 2 * quarter] or mib), mean(mib[-quarter:])


def losses(folder: Path) -> list[tuple[int, float]]:
    """Return the logged (step, loss) pairs, in the order of the file."""
    return [(record["step"], record["loss"]) for record in logged_steps(folder)]


def newest_checkpoint(folder: Path) -> dict:
    """Read the newest checkpoint of a run."""
    newest, _ = Checkpoints(folder / "checkpoints").find_newest()
    assert newest is not None, f"no checkpoint in {folder}"
    return read_checkpoint(newest)


def count_differences(a: Path, b: Path) -> dict[str, int]:
    """Count the steps, clips and tensors that differ between two runs."""
    first, second = newest_checkpoint(a), newest_checkpoint(b)
    steps = set(losses(a)) ^ set(losses(b))
    repeated = len(losses(b)) - len(dict(losses(b)))
    weights = sum(not torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    clips = sum(abs(first["progress"][kind] - second["progress"][kind]) for kind in ("clips", "bad"))
    return {
        "logged steps that differ": len({step for step, _ in steps}),
        "logged steps repeated": repeated,
        "clips lost or repeated": clips,
        f"of {len(first['model'])} tensors, not bitwise equal": weights,
    }


def main() -> None:
    """Run both and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--every", type=float, default=60.0, help="mean seconds from a start to its kill")
    parser.add_argument("--seed", type=int, default=0, help="of the random kill times")
    parser.add_argument("--bad", type=float, default=0.0, help="share of bad videos")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    options, arguments = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    arguments = ["deterministic=true", "precision=fp32", "test.enable=false", "checkpoint.every_steps=5", *arguments]
    if options.bad:
        root = options.folder / "motion"
        print(f"{make_bad_videos(root, options.bad, options.seed, arguments)} bad videos in {root}", flush=True)
        arguments.append(f"dataset.root={root}")
    whole, killed = options.folder / "whole", options.folder / "killed"
    rng, peaks, started = random.Random(options.seed), [], time.monotonic()
    code, undisturbed_peak, _ = run_program([*arguments, f"output_dir={whole}"], options.folder / "whole.log")
    assert code == 0, f"the undisturbed run failed: see {options.folder / 'whole.log'}"
    kills = orphans = 0
    while True:
        limit_s = rng.uniform(0, 2 * options.every) if kills < options.kills else None
        code, peak, left = run_program([*arguments, f"output_dir={killed}"], options.folder / "killed.log", limit_s)
        peaks.append(peak)
        orphans += left
        if code is not None:
            break
        kills += 1
    assert code == 0, f"the killed run failed: see {options.folder / 'killed.log'}"
    differences = count_differences(whole, killed)
    progress = newest_checkpoint(whole)["progress"]
    elapsed = time.monotonic() - started
    steps, clips, bad = (progress[kind] for kind in ("step", "clips", "bad"))
    print(f"{kills} kills in {elapsed:.0f} s, {steps} steps, {clips} clips, {bad} of them bad")
    for what, count in differences.items():
        print(f"{what}: {count}")
    print(
        f"peak memory of the training process: {undisturbed_peak:.0f} MiB undisturbed, "
        f"at most {max(peaks):.0f} MiB between kills"
    )
    print("undisturbed, in the second quarter {:.0f} MiB, in the last {:.0f}".format(*memory_over_time(whole)))
    print(f"processes that outlived a kill by 30 seconds: {orphans}")
    raise SystemExit(1 if any(differences.values()) or orphans else 0)


if __name__ == "__main__":
    with terminal():
        main()
