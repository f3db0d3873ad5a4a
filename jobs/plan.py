"""What a training run will take, before it is paid for: memory, largest micro-batch, hours, cost, checkpoints.

python -m jobs.plan experiment=sd15_256 gpus=8 gpu=h100
python -m jobs.plan experiment=sd15_256 gpus=8 gpu=a100-80 price_per_gpu_hour=1.9 measured=runs/trial/metrics.jsonl
python -m jobs.plan stage=autoencoder gpu=cpu gpus=2 out=runs/plan

Takes the settings and groups of `python -m jobs.train`. Nothing is trained: networks are built without weights, and one
step is counted on them, for pictures (stage 2: for latents of pictures) of `size` pixels. `measured=` sets the throughput
of a short run beside the assumed one.
"""

import sys

from latentray.config import command
from latentray.config.plan import PlanConfig
from latentray.planning import plan_report


def main() -> int:
    return command.run("plan", PlanConfig, plan_report.run)


if __name__ == "__main__":
    sys.exit(main())
