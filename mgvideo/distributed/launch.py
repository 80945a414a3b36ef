"""Read what the launcher, torchrun or srun, sets in the environment, and choose the GPU of each rank."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

import torch

from mgvideo.errors import UserError


def ranks_from_slurm() -> None:
    """Set torchrun's environment variables from srun's, if srun without torchrun started several processes.

    MASTER_ADDR and MASTER_PORT keep values that are already set.

    Raises:
        UserError: some of srun's variables are not set, as in a container that does not pass them on.
    """
    env = os.environ
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in env or tasks == "1" or _in_interactive_shell(env):
        return
    needed = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_GTIDS"]
    needed += [] if "MASTER_ADDR" in env else ["SLURM_STEP_NODELIST"]
    needed += [] if "MASTER_PORT" in env else ["SLURM_JOB_ID"]
    missing = [name for name in needed if not env.get(name)]
    if missing:
        raise UserError(
            f"srun started {tasks} processes, but {', '.join(missing)} is not set here: pass SLURM's variables into "
            "the container, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_host(env["SLURM_STEP_NODELIST"])
    if "MASTER_PORT" not in env:
        # the same port on all ranks, different for each job and step, and below the usual range of ephemeral ports
        env["MASTER_PORT"] = str(12000 + (int(env["SLURM_JOB_ID"]) + 101 * int(env.get("SLURM_STEP_ID", "0"))) % 20000)
    env["WORLD_SIZE"], env["RANK"] = tasks, env["SLURM_PROCID"]
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = env["SLURM_LOCALID"], str(len(env["SLURM_GTIDS"].split(",")))


def _in_interactive_shell(env: Mapping[str, str]) -> bool:
    """Whether a user typed this command into a shell of `srun --pty`; srun's other tasks then never join it.

    A shell with job control gives each command a process group of its own. srun's tasks, and commands in scripts, stay
    in the process group of the terminal's session leader.
    """
    return "SLURM_PTY_PORT" in env and env.get("SLURM_PROCID") == "0" and os.getpgrp() != os.getsid(0)


def first_host(hosts: str) -> str:
    """Return the first name in SLURM's list of hosts: `a03-x` for `a[03-05,9]-x,b`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else hosts


def launched_number(name: str, default: str | None = None) -> int:
    """Return an integer that the launcher sets in the environment. Raises UserError if it is missing or no integer."""
    text = os.environ.get(name, default)
    if text is None or not text.isdecimal():
        raise UserError(
            f"{name}{'' if text is None else f'={text}'}: torchrun or srun sets it; without them, set RANK from 0 to "
            "WORLD_SIZE - 1, LOCAL_RANK, MASTER_ADDR and MASTER_PORT too, or unset all of them for one process"
        )
    return int(text)


def visible_gpus() -> list[str]:
    """Return the UUIDs of the GPUs that are visible to this process. They are the same in all processes."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def choose_gpu(rank: int, visible: Sequence[Sequence[str]]) -> int | None:
    """Return the index of a rank's GPU among its visible ones, from the UUIDs visible to each rank; None without GPUs.

    In the order of ranks, each takes its first visible GPU that no earlier rank took. So where all GPUs of a node are
    visible to all its ranks, each takes the GPU of its local rank; where one is visible to each, as with srun's
    --gpus-per-task=1, each takes that one.

    Raises:
        UserError: a rank is left without a GPU; the message is the same on all ranks.
    """
    if not any(visible):
        return None
    taken: set[str] = set()
    choices = []
    for number, gpus in enumerate(visible):
        free = [index for index, gpu in enumerate(gpus) if gpu not in taken]
        if not free:
            reason = f"earlier ranks took the {len(gpus)} that are visible to it" if gpus else "none is visible to it"
            raise UserError(
                f"rank {number} has no GPU of its own: {reason}. Start one process for each GPU of a node, and make "
                "visible to each process all of them (srun --gpus-per-node) or one of its own (--gpus-per-task=1)"
            )
        taken.add(gpus[free[0]])
        choices.append(free[0])
    return choices[rank]
