"""Look at a data set: counts, sizes, captions, damaged samples, and a contact sheet; of clips, episodes and latents too.

python -m jobs.inspect_shards data=runs/data/shapes
python -m jobs.inspect_shards data=runs/latents
python -m jobs.inspect_shards data=s3://bucket/photos/train check=0 out=inspection
"""

import sys

from latentray.config import command
from latentray.config.inspect_shards import InspectShards
from latentray.evaluation import data_sets


def main() -> int:
    return command.run("inspect_shards", InspectShards, data_sets.inspect)


if __name__ == "__main__":
    sys.exit(main())
