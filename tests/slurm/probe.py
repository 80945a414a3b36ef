"""Prints, as a rank, the cores that it gets of its machine and the loader workers that it would start."""

import json
import os
import sys

from mgvideo.cli.app import compose_config
from mgvideo.cli.build import loader_options
from mgvideo.distributed.collectives import rank, rank_cpus, world_size
from mgvideo.distributed.process_group import process_group

with process_group(timeout_s=60):
    cores, options = rank_cpus(), loader_options(compose_config("run", []))
    found = {"rank": rank(), "ranks": world_size(), "cores": str(cores), "workers": options.num_workers}
    # in one piece: srun merges the lines of ranks
    os.write(sys.stdout.fileno(), f"{json.dumps(found)}\n".encode())
