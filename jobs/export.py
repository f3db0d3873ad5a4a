"""Hand out a model: the whole weights of a checkpoint, or a model or release in a layout that other tools load.

python -m jobs.export run=runs/my-model out=runs/my-weights
python -m jobs.export checkpoint=s3://bucket/runs/my-model/checkpoints/000120000-3fa2c1 state=weight out=runs/raw
python -m jobs.export model=production registry=runs/registry to=diffusers out=exported/my-model
python -m jobs.export model=runs/my-model/model to=single_file out=exported/my-model
"""

import sys

from latentray.config import command
from latentray.config.export import Export
from latentray.interchange import exporting
from latentray.training import consolidation


def export(config: Export) -> str:
    return consolidation.export(config) if config.to == "weights" else exporting.export(config)


def main() -> int:
    return command.run("export", Export, export)


if __name__ == "__main__":
    sys.exit(main())
