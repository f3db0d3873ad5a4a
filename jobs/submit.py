"""Send a job to a running Ray cluster and follow its output.

    python -m jobs.submit job=train address=http://127.0.0.1:8265 -- stage=autoencoder data=s3://bucket/shapes

What stands after `--` are the job's own settings, exactly as it takes them itself; they are composed here first, so
that a misspelt one costs no submission. This checkout travels along (`.rayignore` says what stays behind), and the job
runs as `python -m jobs.<job>` on the cluster's head. The output is streamed until the job ends, and its exit code
becomes this one's; `wait=false` returns at once. A cluster with token authentication wants RAY_AUTH_MODE=token and
RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) in the environment.
"""

from __future__ import annotations

import sys

from jobs import submission
from latentray.config import command
from latentray.config.submit import SubmitConfig


def main() -> int:
    own, theirs = submission.split_command_line(sys.argv[1:])
    ended: list[int] = []
    code = command.run("submit", SubmitConfig, lambda config: ended.append(submission.submit(config, theirs)), own)
    return code or sum(ended)


if __name__ == "__main__":
    sys.exit(main())
