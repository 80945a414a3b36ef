"""Run as a rank: print its share of the machine's cores and the number of loader workers that it would start."""

import json
import os
import sys

from mgvideo.cli.app import compose_config
from mgvideo.cli.build import loader_options
from mgvideo.distributed.collectives import rank, rank_cpus, world_size
from mgvideo.distributed.process_group import process_group

with process_group(timeout_s=60):
    cores, options = rank_cpus(), loader_options(compose_config("run", []))
    result = {"rank": rank(), "ranks": world_size(), "cores": str(cores), "workers": options.num_workers}
    # in a single write: srun mixes the output of ranks
    os.write(sys.stdout.fileno(), f"{json.dumps(result)}\n".encode())
