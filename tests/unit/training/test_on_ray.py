"""What a cluster has to have before its workers start."""

from __future__ import annotations

import pytest

from latentray.config.cluster import ClusterConfig
from latentray.config.train import Train
from latentray.errors import ConfigError
from latentray.training import on_ray


def config(**cluster) -> Train:
    return Train(cluster=ClusterConfig(**cluster))


@pytest.mark.parametrize(
    ("device", "gpus", "taken"), [("auto", 4, True), ("auto", 0, False), ("cpu", 4, False), ("cuda", 2, True)]
)
def test_workers_take_gpus_where_there_are_enough(device, gpus, taken):
    assert on_ray.wants_gpus(config(workers=2, device=device), gpus) is taken


@pytest.mark.parametrize(("device", "gpus"), [("auto", 1), ("cuda", 1), ("cuda", 0)])
def test_too_few_gpus_are_refused_and_never_left_idle(device, gpus):
    with pytest.raises(ConfigError, match=f"2 workers want a GPU each; the cluster has {gpus}") as caught:
        on_ray.wants_gpus(config(workers=2, device=device), gpus)
    assert caught.value.where == "cluster.workers" and "cluster.device=cpu" in caught.value.mend


def test_a_run_that_may_begin_with_fewer_needs_no_more(capsys):
    fewer = config(workers=4, min_workers=2)
    assert on_ray.wants_gpus(fewer, 2)
    on_ray.require_cpus(fewer, 2, grows=False)
    on_ray.require_cpus(config(workers=4, cpus_per_worker=0.5), 2, grows=False)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("cluster", "want"), [({"workers": 8}, 8), ({"workers": 8, "min_workers": 3}, 3)])
def test_more_workers_than_cpus_are_refused_on_this_machine_and_waited_for_elsewhere(cluster, want, capsys):
    with pytest.raises(ConfigError, match=f"want {want} CPUs; this machine has 2") as caught:
        on_ray.require_cpus(config(**cluster), 2, grows=False)
    assert caught.value.where == "cluster.workers" and "cluster.cpus_per_worker" in caught.value.mend
    on_ray.require_cpus(config(**cluster), 2, grows=True)
    assert f"waiting for nodes: the workers want {want} CPUs, and the cluster has 2" in capsys.readouterr().out
