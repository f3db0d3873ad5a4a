"""Train an autoencoder, a denoiser, or a classifier that guides one.

python -m jobs.train stage=autoencoder data=runs/data/shapes
python -m jobs.train stage=diffusion latents=runs/latents run=my-model
python -m jobs.train stage=diffusion data=runs/data/shapes online.enabled=true autoencoder_from=runs/autoencoder
python -m jobs.train stage=diffusion denoiser=video_sd15 latents=runs/clips denoiser_from=runs/my-model/model
python -m jobs.train stage=diffusion latents=runs/latents denoiser_from=stable-diffusion-v1-5/stable-diffusion-v1-5
python -m jobs.train stage=classifier denoiser=classifier_f8 objective=adm latents=runs/latents run=my-classifier
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
