"""Encode a data set's pictures or clips and their captions once, for every epoch of stage 2.

python -m jobs.precompute_latents data=runs/data/shapes autoencoder_from=runs/ae/autoencoder out=runs/latents
python -m jobs.precompute_latents data=s3://bucket/photos autoencoder_from=... out=... buckets.sizes=[512,1024]
python -m jobs.precompute_latents data=runs/data/moving autoencoder_from=... out=... clip.frames=16

What it will take, without writing anything: add estimate=true. After the data set grew: a new out=, and reuse=<the old one>.
"""

import sys

from latentray.config import command
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.data import precompute


def main() -> int:
    return command.run("precompute_latents", PrecomputeLatents, precompute.precompute)


if __name__ == "__main__":
    sys.exit(main())
