"""Are machines, cluster, storage and services fit for a run? Exit code 2 where one is not; each finding says what to do.

python -m jobs.doctor
python -m jobs.doctor cluster.address=auto storage=s3://bucket/runs
python -m jobs.doctor cluster=none tracking=none json=true

Looks at versions on every node, the cluster and its resources, ports, the storage (written, listed, read and deleted from
every node), clocks, GPUs, an all-reduce between processes, W&B, disks, shared memory, open files, the cache and the hub.
"""

import sys

from latentray.config import command
from latentray.config.doctor import DoctorConfig
from latentray.planning import doctor, findings


def main() -> int:
    found: list[findings.Finding] = []
    code = command.run("doctor", DoctorConfig, lambda config: found.extend(doctor.run(config)))
    return code or (command.USER_MISTAKE if findings.worst(found) == findings.FAILED else 0)


if __name__ == "__main__":
    sys.exit(main())
