"""What a launcher, torchrun or srun, says to a process: which of how many ranks it is, where they meet, its GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

import torch

from mgvideo.errors import UserError


def ranks_from_slurm() -> None:
    """Set the variables that torchrun would set, where srun started several processes and torchrun did not.

    Raises:
        UserError: some of srun's variables did not reach this process, as from outside a container.
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
        # the same on all ranks, another for each job and step, below the ports that systems hand out
        env["MASTER_PORT"] = str(12000 + (int(env["SLURM_JOB_ID"]) + 101 * int(env.get("SLURM_STEP_ID", "0"))) % 20000)
    env["WORLD_SIZE"], env["RANK"] = tasks, env["SLURM_PROCID"]
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = env["SLURM_LOCALID"], str(len(env["SLURM_GTIDS"].split(",")))


def _in_interactive_shell(env: Mapping[str, str]) -> bool:
    """Whether a person typed this command into a shell of `srun --pty`, whose other tasks will never join it.

    A shell with job control puts each command into a process group of its own; srun's tasks, and what scripts start,
    are in the group of the terminal's session.
    """
    return "SLURM_PTY_PORT" in env and env.get("SLURM_PROCID") == "0" and os.getpgrp() != os.getsid(0)


def first_host(hosts: str) -> str:
    """The first name of SLURM's list of hosts: `a[03-05,9]-x,b` is `a03-x` and others."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else hosts


def launched_number(name: str, default: str | None = None) -> int:
    """A number that the launcher sets in the environment. Raises UserError."""
    text = os.environ.get(name, default)
    if text is None or not text.isdecimal():
        raise UserError(
            f"{name}{'' if text is None else f'={text}'}: torchrun or srun sets it, and without them so must you: RANK "
            "from 0 below WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; or leave all of them out for one process"
        )
    return int(text)


def visible_gpus() -> list[str]:
    """Identifiers of the GPUs that this process sees, the same in all processes that see them."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def choose_gpu(rank: int, visible: Sequence[Sequence[str]]) -> int | None:
    """Which of the GPUs that it sees a rank takes, given what each rank sees; None where no rank sees one.

    In the order of ranks, each takes the first GPU that no rank before it took. So ranks that see all GPUs of a node
    take one each by their number there, and a rank that sees one GPU takes that one, as with srun's --gpus-per-task.

    Raises:
        UserError: a rank is left without a GPU, the same one on all ranks.
    """
    if not any(visible):
        return None
    taken: set[str] = set()
    choices = []
    for number, gpus in enumerate(visible):
        free = [index for index, gpu in enumerate(gpus) if gpu not in taken]
        if not free:
            seen = f"the {len(gpus)} that it sees are taken by ranks before it" if gpus else "it sees none"
            raise UserError(
                f"rank {number} has no GPU of its own: {seen}. Start as many processes a node as it has GPUs, and let "
                "each see all of them (srun --gpus-per-node) or one of its own (--gpus-per-task=1)"
            )
        taken.add(gpus[free[0]])
        choices.append(free[0])
    return choices[rank]
