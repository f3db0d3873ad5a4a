"""Where a run's metrics, pictures and artifacts are recorded: `metrics.jsonl` always, W&B where it is wanted.

    tracking.check(config)                                          # in the job, before anything starts
    tracker = tracking.open(config, run_id, folder, resolved)       # in rank 0 of the training worker
    tracker.log(samples, {names.TRAIN_LOSS: 0.12})

Only this package imports `wandb`.
"""

from latentray.tracking.tracker import Tracker, check, open

__all__ = ["Tracker", "check", "open"]
