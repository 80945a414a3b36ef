"""The command-line programs. Each is a module that composes a config, builds objects and calls the core."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from mgvideo.distributed.signals import record_early_signals
from mgvideo.errors import UserError
from mgvideo.loading.workers import start_fork_server

from .terminal import restart_in_utf8_mode, terminal

PROGRAMS = {
    "run": "train and test a network",
    "doctor": "check this machine before training",
    "plan": "show the plan of a run and its cost before training",
    "prepare": "check a dataset, build its pyramid, list its videos, draw its clips, or generate the motion dataset",
    "reproduce": "run the experiments of a table of the paper and report them",
    "test": "test trained weights on a dataset",
    "predict": "print the top classes of videos, or draw them into the videos",
    "features": "write the pooled features of videos as a NumPy array",
    "export": "export a trained network as a torch.export or ONNX file",
    "from_pyslowfast": "print the command for a config of PySlowFast, and what it could not translate",
    "benchmark": "measure the loader, a training step at each grid of a plan, or the trainer",
}


def command(*program: str) -> None:
    """Entry point of the installed command `mgvideo PROGRAM …`, and of the files in tools/, which pass the program."""
    restart_in_utf8_mode()
    main([*program, *sys.argv[1:]])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a program in this process. `arguments` are its name and its arguments, by default those of `sys.argv`."""
    _set_torch_defaults()
    with terminal():
        _run(sys.argv[1:] if arguments is None else arguments)


def _set_torch_defaults() -> None:
    """Set environment variables that torch reads when it is imported, unless they are set.

    Processes that this one starts, such as loader workers, inherit the variables.
    """
    # OpenMP threads that wait spin briefly, because most waits are short, and then sleep, because loader workers need
    # the cores: docs/notes/speed.md.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # The grids of a plan need tensors of different sizes, which fragment GPU memory if its segments have a fixed size.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _run(program_and_arguments: Sequence[str]) -> None:
    program, arguments = (program_and_arguments[:1] or ["--help"])[0], program_and_arguments[1:]
    if program in PROGRAMS:
        if program == "run" and not {"--multirun", "-m"} & set(arguments):
            record_early_signals()  # imports take seconds, and a scheduler may send a signal meanwhile
            if not any(word.startswith(("-", "loader.num_workers=0", "loader.start_method=")) for word in arguments):
                with suppress(UserError):  # the run raises it again, and reports it
                    start_fork_server()  # it imports the modules of the workers while this process imports its own
        importlib.import_module(f"mgvideo.cli.{program}").main(arguments)
        return
    usage = "\n".join(f"  mgvideo {name:<15} {text}" for name, text in PROGRAMS.items())
    print(f"mgvideo: multigrid training of video networks\n\n{usage}\n\nAdd --help for the arguments of a program.")
    if program not in ("-h", "--help"):
        print(f"error: there is no program '{program}'", file=sys.stderr)
        raise SystemExit(2)
