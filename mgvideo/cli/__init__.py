"""The programs: one module each, which composes a config, builds objects and calls the core."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

from mgvideo.distributed.signals import record_early_signals
from mgvideo.errors import UserError
from mgvideo.loading.workers import start_fork_server

from .terminal import restart_in_utf8_mode, terminal

# Threads that wait for each other spin a little, since most waits are short, and then sleep, since loader workers need
# the cores: docs/benchmarks/speed.md. Before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# A plan's grids differ in the sizes of their tensors, which leaves gaps between segments of fixed size in GPU memory.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# fvcore compiles losses that nobody here uses as it is imported, and torch says at length what it thinks of that
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
# several labels: the largest score over views, which a test holds to what it should be
warnings.filterwarnings("ignore", "index_reduce", UserWarning)

PROGRAMS = {
    "run": "train and test a network",
    "doctor": "check this machine before training",
    "plan": "show the plan of a run before paying for it",
    "prepare": "check a dataset, build its pyramid, list it, or make the embedded one",
    "reproduce": "run a table of the paper and report it",
    "predict": "print the top classes of videos, or draw them in",
    "export": "write a trained network as a torch.export or ONNX file",
    "benchmark": "measure the loader, a step at each grid of a plan, or the trainer",
}


def command(*program: str) -> None:
    """Entry point of the installed command `mgvideo PROGRAM …`, and of the files in tools/, which name the program."""
    restart_in_utf8_mode()
    main([*program, *sys.argv[1:]])


def main(words: Sequence[str] | None = None) -> None:
    """Run a program in this process: its name and its arguments, by default those of the command line."""
    with terminal():
        _run(sys.argv[1:] if words is None else words)


def _run(words: Sequence[str]) -> None:
    program, arguments = (words[:1] or ["--help"])[0], words[1:]
    if program in PROGRAMS:
        if program == "run" and not {"--multirun", "-m"} & set(arguments):
            record_early_signals()  # imports take a while, in which a job may be asked to stop
            if not any(word.startswith(("-", "loader.num_workers=0", "loader.start_method=")) for word in arguments):
                with suppress(UserError):  # raised again where the run can report it
                    start_fork_server()  # and workers take as long to import theirs
        importlib.import_module(f"mgvideo.cli.{program}").main(arguments)
        return
    usage = "\n".join(f"  mgvideo {name:<10} {text}" for name, text in PROGRAMS.items())
    print(f"mgvideo: multigrid training of video networks\n\n{usage}\n\nEach explains itself with --help.")
    if program not in ("-h", "--help"):
        print(f"error: there is no program '{program}'", file=sys.stderr)
        raise SystemExit(2)
