"""Draw pictures or clips from a release, or a sheet that compares samplers, guidance or steps.

python -m jobs.sample release=production registry=runs/quickstart/registry prompt='a red circle on a white background'
python -m jobs.sample release=runs/my-model/model prompt='...' compare=guidance out=guidance.png
python -m jobs.sample release=runs/my-model/model prompt='...' picture=photo.png mask=mask.png
python -m jobs.sample release=runs/my-model/model label=3 classifier=runs/my-classifier/classifier classifier_scale=2
python -m jobs.sample release=runs/my-video/model prompt='...' frames=16 out=clips.webp
"""

import sys

from jobs.sampling import draw
from latentray.config import command
from latentray.config.sample import Sample


def main() -> int:
    return command.run("sample", Sample, draw)


if __name__ == "__main__":
    sys.exit(main())
