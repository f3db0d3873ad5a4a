"""Encode a data set's pictures or clips and their captions once, for every epoch of stage 2.

python -m jobs.precompute_latents data=runs/data/shapes autoencoder_from=runs/ae/autoencoder out=runs/latents
python -m jobs.precompute_latents data=runs/photos autoencoder_from=stabilityai/sd-vae-ft-mse out=... buckets.sizes=[512,1024]
python -m jobs.precompute_latents data=runs/data/moving autoencoder_from=... out=... clip.frames=16

What it will take, without writing anything: add estimate=true. After the data set grew: a new out=, and reuse=<the old one>.
"""

import sys

from latentray.checkpoint import store
from latentray.config import command
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.data import precompute
from latentray.interchange import resolving

MODELS = {"autoencoder_from": "autoencoder"}


def encode(config: PrecomputeLatents) -> list[str]:
    """What the latents go on naming as their autoencoder lies beside them, whoever made it."""
    out = store.absolute(config.out or "")
    found = resolving.resolved(config, MODELS, beside=out)
    if config.estimate or found == config:
        return precompute.precompute(found)
    precompute.check(found)  # a copy is not left beside latents that there cannot be
    return precompute.precompute(resolving.kept(found, MODELS, of=config, beside=out))


def main() -> int:
    return command.run("precompute_latents", PrecomputeLatents, encode)


if __name__ == "__main__":
    sys.exit(main())
