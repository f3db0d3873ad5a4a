"""What the quickstart does on machines that are not alike."""

import pytest

from jobs.quickstart_stages import training_workers


@pytest.mark.parametrize(("gpus", "workers"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_a_machine_with_fewer_gpus_than_workers_trains_with_one_for_each(gpus, workers):
    assert training_workers(2, gpus=gpus) == workers
