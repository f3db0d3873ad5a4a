"""Write the whole weights of a checkpoint as safetensors, without a GPU or a cluster.

python -m jobs.export run=runs/my-model out=runs/my-weights
python -m jobs.export checkpoint=s3://bucket/runs/my-model/checkpoints/000120000-3fa2c1 state=weight out=runs/raw
"""

import sys

from latentray.config import command
from latentray.config.export import Export
from latentray.training import consolidation


def main() -> int:
    return command.run("export", Export, consolidation.export)


if __name__ == "__main__":
    sys.exit(main())
