"""A real SLURM with two nodes on this host, which ends with the process that started it.

Both nodes have this host's cores. Tasks are bound to cores only if srun's --cpu-bind binds them.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from training import free_ports

TOOLS = ("slurmctld", "slurmd", "munged", "unshare", "setpriv", "sbatch")
NODES = {"n1": "127.0.1.1", "n2": "127.0.1.2"}
END_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")

SLURM_CONF = """ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
TaskPluginParam=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2
MinJobAge=3600
KillWait=10
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

START_SCRIPT = """set -e
mount --bind {folder}/hosts /etc/hosts
munged -F --socket={folder}/munge/sock --key-file={folder}/munge/key --pid-file={folder}/munge/pid \
  --log-file={folder}/munge/log --seed-file={folder}/munge/seed &
until [ -S {folder}/munge/sock ]; do sleep 0.05; done
slurmctld -D &
for node in n1 n2; do unshare -u sh -c "hostname $node && exec slurmd -D -N $node" & done
wait
"""

# submitit calls sacct, which needs an accounting database. This replacement reads recent jobs from the controller.
SACCT_SCRIPT = """#!{python}
import re, subprocess, sys
wanted = {{a.split("_")[0].split(".")[0] for f, a in zip(sys.argv, sys.argv[1:]) if f == "-j"}}
print("JobID|State|NodeList")
for line in subprocess.run(["scontrol", "-o", "show", "job"], capture_output=True, text=True).stdout.splitlines():
    job = dict(re.findall(r"(\\S+?)=(\\S*)", line))
    array = job.get("ArrayJobId")
    if {{job.get("JobId"), array}} & wanted:
        name = f"{{array}}_{{job['ArrayTaskId']}}" if array else job["JobId"]
        print(f"{{name}}|{{job['JobState']}}|{{job.get('NodeList', '')}}")
"""


def unavailable_reason() -> str | None:
    """Return why SLURM cannot run here, None if it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"SLURM is not installed: no {', '.join(missing)}"
    if os.geteuid() != 0:
        return "SLURM's two nodes need root"
    if subprocess.run(["unshare", "-p", "-m", "-u", "-f", "--mount-proc", "true"], capture_output=True).returncode:
        return "this host does not allow namespaces"
    return None


class Cluster:
    """Two nodes, n1 and n2, with four CPUs each. `environment` holds the variables of client programs."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
        self.folder.chmod(0o755)
        self._configure()
        removed = ("SLURM", "SBATCH", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(removed)}
        self.environment |= {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
        }
        namespace = ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--mount", "--fork", "--mount-proc"]
        self.process = subprocess.Popen(
            [*namespace, "--kill-child=KILL", "sh", "-c", START_SCRIPT.format(folder=self.folder)],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=open(self.folder / "log", "w"),  # noqa: SIM115  the child process keeps it open
        )
        self._wait_until_idle()

    def _configure(self) -> None:
        controller, *ports = free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={address} Port={port} CPUs=4 RealMemory=8000"
            for (name, address), port in zip(NODES.items(), ports, strict=True)
        )
        host = socket.gethostname().split(".")[0]
        conf = SLURM_CONF.format(host=host, folder=self.folder, controller=controller, nodes=nodes)
        (self.folder / "slurm.conf").write_text(conf)
        host_lines = Path("/etc/hosts").read_text().rstrip("\n")
        hosts = [host_lines, *(f"{address} {name}" for name, address in NODES.items()), ""]
        (self.folder / "hosts").write_text("\n".join(hosts))
        (self.folder / "state").mkdir()
        (self.folder / "munge").mkdir(mode=0o711)
        (self.folder / "munge" / "key").write_bytes(os.urandom(1024))
        (self.folder / "munge" / "key").chmod(0o400)
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / "sacct").write_text(SACCT_SCRIPT.format(python=sys.executable))
        (self.folder / "bin" / "sacct").chmod(0o755)

    def _wait_until_idle(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds  # after which the logs of a SLURM that does not start are shown
        while self.process.poll() is None and time.monotonic() < deadline:
            if self.run("sinfo", "-h", "-N", "-o", "%t", check=False).stdout.split() == ["idle"] * len(NODES):
                return
            time.sleep(0.2)
        logs = "\n".join(path.read_text()[-2000:] for path in (self.folder / "log", self.folder / "slurmctld.log"))
        self.close()
        raise RuntimeError(f"SLURM did not start within {seconds} s:\n{logs}")

    def run(self, *command: str, check: bool = True, **options: object) -> subprocess.CompletedProcess:
        """Run a command with the environment of this SLURM."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=check, **options)  # type: ignore[call-overload]

    def sbatch(self, *arguments: str, cwd: Path) -> str:
        """Submit a batch job; returns its id."""
        process = self.run("sbatch", "--parsable", *arguments, cwd=cwd, check=False)
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return the controller's fields of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "-o", "show", "job", job).stdout))

    def wait(self, job: str) -> str:
        """Wait until a job has ended; returns its state."""
        while (state := self.job(job)["JobState"]) not in END_STATES:
            time.sleep(0.2)
        return state

    def close(self) -> None:
        """Kill all its processes and wait for them."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
