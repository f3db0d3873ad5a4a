"""The device of a worker, and what a machine without one is told."""

import pytest
import torch

from latentray.errors import ConfigError
from latentray.training import worker


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n): a machine that has so many."""

    def set_to(count: int) -> list[torch.device]:
        chosen: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return set_to


def test_each_worker_takes_the_gpu_of_its_own_number(gpus):
    chosen = gpus(2)
    assert [worker.device_of("auto", rank) for rank in (0, 1)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert chosen == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert worker.device_of("cpu", 5) == torch.device("cpu")


def test_more_workers_than_gpus_are_refused_by_the_settings_name(gpus):
    chosen = gpus(2)
    with pytest.raises(ConfigError, match="Worker 3 of this machine has no GPU of its own: there are 2") as caught:
        worker.device_of("cuda", 2)
    assert caught.value.where == "cluster.device"
    assert "--nproc-per-node" in caught.value.mend and not chosen


def test_a_gpu_that_is_not_there_is_told_by_the_settings_name(gpus):
    gpus(0)
    with pytest.raises(ConfigError, match="no usable GPU") as caught:
        worker.device_of("cuda", 0)
    assert caught.value.where == "cluster.device"
    assert "cluster.device=auto" in caught.value.mend
