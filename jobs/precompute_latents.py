"""Encode a data set's pictures and captions once, for every epoch of stage 2.

python -m jobs.precompute_latents data=runs/data/shapes autoencoder_from=runs/ae/autoencoder out=runs/latents

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
