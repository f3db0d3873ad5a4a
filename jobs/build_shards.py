"""Pack pictures with captions into WebDataset shards with an index.

    python -m jobs.build_shards                                        # the drawn shapes set
    python -m jobs.build_shards source=folder path=my/pictures out=data/mine
    python -m jobs.build_shards source=table path=my/table.csv source.caption_column=text out=s3://bucket/data/mine
    python -m jobs.build_shards source=webdataset path=laion out=data/laion 'filter.scores={aesthetic: [5.0, null]}' \\
        filter.min_side=512 duplicates=near
    python -m jobs.build_shards source=webdataset path=laion out=data/recaptioned source.captions=captions.parquet
    python -m jobs.build_shards source=webdataset path='s3://bucket/laion/*.tar' source.index_only=true out=data/laion

A folder holds JPEG, PNG or WebP pictures with a `.txt` beside each; a table (CSV, JSONL, Parquet) holds paths and
captions; WebDataset tars hold `<key>.jpg`, `.txt` and `.json`, and are packed anew or, with index_only, left where they are.
What cannot be used is counted by reason and listed in `rejected.jsonl`; what a filter leaves out, and what repeats an earlier
picture, is counted. The result is two data sets, `<out>/train` and `<out>/validation`.
"""

from __future__ import annotations

import sys

from latentray.config import command
from latentray.config.build_shards import BuildShards


def build(config: BuildShards) -> None:
    from latentray.data import shard_building

    shard_building.build(config)


def main() -> int:
    return command.run("build_shards", BuildShards, build)


if __name__ == "__main__":
    sys.exit(main())
