"""Kill a run at random moments until it ends, and compare it with one left alone:

    python tools/soak.py --kills 10 --every 60 --bad 0.01 base.epochs=40

Runs the same arguments (of tools/run_net.py) twice on this machine, in --folder: once undisturbed; once with SIGKILL at
a random moment, drawn evenly from [0, 2·every] seconds after each start, until the kills are used up, then to its end.
Reports steps lost, weights that differ, memory and processes left behind, and leaves with 1 where the two runs do not
end alike or a process outlives a kill. With --bad, both read a copy of Motion in --folder of which that share of the
videos is cut to half its bytes.
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

import psutil
import torch

from mgvideo.cli.terminal import terminal
from mgvideo.storage.checkpoints import Checkpoints, read_checkpoint

PROGRAM = Path(__file__).with_name("run_net.py")
PREPARE = Path(__file__).with_name("prepare_data.py")


def spoiled(root: Path, share: float, seed: int, overrides: Sequence[str]) -> int:
    """Make Motion at `root`, unless it is there, and cut a share of its videos to half their bytes; how many."""
    if not root.exists():
        data = [argument for argument in overrides if argument.startswith("dataset.")]
        subprocess.run([sys.executable, str(PREPARE), "motion", *data, f"dataset.root={root}"], check=True)
    videos = sorted(root.rglob("*.mp4"))
    chosen = random.Random(seed).sample(videos, round(share * len(videos)))
    for video in chosen:
        video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    return len(chosen)


def run(arguments: Sequence[str], log: Path, limit: float | None = None) -> tuple[int | None, float, int]:
    """Run to the end, or kill it after `limit` seconds: exit code (None: killed), peak memory (MiB), processes left."""
    peak, start = 0.0, time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        process = psutil.Popen([sys.executable, str(PROGRAM), *arguments], stdout=file, stderr=subprocess.STDOUT)
    while process.poll() is None:
        if limit is not None and time.monotonic() - start > limit:
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


def memory(folder: Path) -> tuple[float, float]:
    """MiB of the training process, means of the second and of the last quarter of the logged steps."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    held = [1024 * line["memory_gib"] for line in lines if "loss" in line]
    quarter = max(1, len(held) // 4)
    return mean(held[quarter : 2 * quarter] or held), mean(held[-quarter:])


def losses(folder: Path) -> list[tuple[int, float]]:
    """Logged steps and losses, in the order of the file."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def final(folder: Path) -> dict:
    """The newest checkpoint."""
    newest, _ = Checkpoints(folder / "checkpoints").find_newest()
    assert newest is not None, f"no checkpoint in {folder}"
    return read_checkpoint(newest)


def differing(a: Path, b: Path) -> dict[str, int]:
    """How many steps and tensors of two runs are not the same."""
    one, two = final(a), final(b)
    steps = set(losses(a)) ^ set(losses(b))
    repeated = len(losses(b)) - len(dict(losses(b)))
    weights = sum(not torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    clips = sum(abs(one["progress"][kind] - two["progress"][kind]) for kind in ("clips", "bad"))
    return {
        "logged steps that differ": len({step for step, _ in steps}),
        "logged steps repeated": repeated,
        "clips lost or repeated": clips,
        f"of {len(one['model'])} tensors, not equal to the last bit": weights,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--every", type=float, default=60.0, help="mean seconds from a start to its kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--bad", type=float, default=0.0, help="share of bad videos")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    options, arguments = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    arguments = ["deterministic=true", "precision=fp32", "test.enable=false", "checkpoint.every_steps=5", *arguments]
    if options.bad:
        root = options.folder / "motion"
        print(f"{spoiled(root, options.bad, options.seed, arguments)} bad videos in {root}", flush=True)
        arguments.append(f"dataset.root={root}")
    whole, killed = options.folder / "whole", options.folder / "killed"
    draw, peaks, begun = random.Random(options.seed), [], time.monotonic()
    code, calm, _ = run([*arguments, f"output_dir={whole}"], options.folder / "whole.log")
    assert code == 0, f"the undisturbed run failed: see {options.folder / 'whole.log'}"
    kills = orphans = 0
    while True:
        limit = draw.uniform(0, 2 * options.every) if kills < options.kills else None
        code, peak, left = run([*arguments, f"output_dir={killed}"], options.folder / "killed.log", limit)
        peaks.append(peak)
        orphans += left
        if code is not None:
            break
        kills += 1
    assert code == 0, f"the killed run failed: see {options.folder / 'killed.log'}"
    found = differing(whole, killed)
    end = final(whole)["progress"]
    took = time.monotonic() - begun
    print(f"{kills} kills in {took:.0f} s, {end['step']} steps, {end['clips']} clips, {end['bad']} of them bad")
    for what, count in found.items():
        print(f"{what}: {count}")
    print(
        f"peak memory of the training process: {calm:.0f} MiB undisturbed, at most {max(peaks):.0f} MiB between kills"
    )
    print("undisturbed, in the second quarter {:.0f} MiB, in the last {:.0f}".format(*memory(whole)))
    print(f"processes that outlived a kill by 30 seconds: {orphans}")
    raise SystemExit(1 if any(found.values()) or orphans else 0)


if __name__ == "__main__":
    with terminal():
        main()
