"""Train an autoencoder or a denoiser.

python -m jobs.train stage=autoencoder data=runs/data/shapes
python -m jobs.train stage=diffusion latents=runs/latents run=my-model
python -m jobs.train stage=diffusion data=runs/data/shapes online.enabled=true autoencoder_from=runs/autoencoder
python -m jobs.train stage=diffusion denoiser=video_sd15 latents=runs/clips denoiser_from=runs/my-model/model
torchrun --nproc-per-node 8 -m jobs.train cluster=none stage=diffusion latents=...
"""

import sys

from latentray.config import command
from latentray.config.train import Train
from latentray.training import launch


def main() -> int:
    return command.run("train", Train, launch.train)


if __name__ == "__main__":
    sys.exit(main())
