"""Make a model folder from others' weights: SD 1, SD 2, SDXL and SD 3, a diffusers folder, a single file or a hub id.

python -m jobs.import_weights weights=stabilityai/stable-diffusion-xl-base-1.0 variant=fp16 out=runs/sdxl/model parts=runs/sdxl
python -m jobs.import_weights weights=v1-5-pruned-emaonly.safetensors out=runs/sd15/model
"""

import sys

from latentray.config import command
from latentray.config.import_weights import ImportWeights
from latentray.interchange import importing


def main() -> int:
    return command.run("import_weights", ImportWeights, importing.import_weights)


if __name__ == "__main__":
    sys.exit(main())
