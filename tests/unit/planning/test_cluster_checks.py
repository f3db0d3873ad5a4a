"""The cluster: addresses that are dead or no cluster, clocks, and a real one."""

import os
import socket
import time

import pytest

from latentray.config.cluster import ClusterConfig
from latentray.config.doctor import DoctorConfig
from latentray.planning import all_reduce, cluster_checks, machine
from latentray.planning.findings import FAILED, OK, WARNING


def config(address, **more):
    return DoctorConfig(cluster=ClusterConfig(address=address), **more)


def test_a_dead_address_is_told_at_once():
    began = time.monotonic()
    (found,) = cluster_checks.check(config(f"127.0.0.1:{machine.free_port()}"))
    assert found.status == FAILED and "refused" in found.what and "ray start --head" in found.mend
    assert time.monotonic() - began < 5


def test_what_answers_but_is_no_cluster_is_given_up_in_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        began = time.monotonic()
        (found,) = cluster_checks.check(config(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=4))
    assert found.status == FAILED
    assert time.monotonic() - began < 15


def test_addresses():
    assert cluster_checks.unreachable_because("auto") == ""
    assert cluster_checks.unreachable_because("local") == ""
    assert cluster_checks.unreachable_because("ray://127.0.0.1:port")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        port = listening.getsockname()[1]
        assert cluster_checks.unreachable_because(f"ray://127.0.0.1:{port}") == ""
        assert cluster_checks.unreachable_because(f"127.0.0.1:{port}") == ""


def test_clocks_fail_only_beyond_doubt():
    assert cluster_checks.skew({"a": (0.2, 0.01), "b": (-0.9, 0.05)}).status == OK
    found = cluster_checks.skew({"a": (0.0, 0.01), "b": (-3.0, 0.05)})
    assert found.status == FAILED and "b is -3.000 s" in found.what and "NTP" in found.mend
    assert cluster_checks.skew({"a": (1.5, 0.7)}).status == OK  # a slow answer says little


def test_resources_are_compared_with_the_workers_wanted():
    has = {"CPU": 64.0, "GPU": 8.0, "memory": 2.0**40}
    assert [one.status for one in cluster_checks.resources(2, 0, has, 8)] == [OK]
    assert cluster_checks.resources(2, 0, has, 65)[0].status == FAILED
    assert [one.status for one in cluster_checks.resources(2, 1, has, 8)] == [OK, WARNING]


def test_nodes_that_share_an_address_are_told_apart():
    nodes = [{"NodeManagerAddress": "10.0.0.1", "NodeID": one * 8} for one in "ab"]
    assert [cluster_checks._label(one, nodes) for one in nodes] == ["10.0.0.1/aaaaaa", "10.0.0.1/bbbbbb"]
    assert cluster_checks._label(nodes[0], nodes[:1]) == "10.0.0.1"


@pytest.mark.cluster
def test_a_real_cluster_is_examined_node_by_node(ray_local, tmp_path):
    found = {
        one.name: one
        for one in cluster_checks.examine(config("auto", storage=str(tmp_path), min_free_gb=0), remote=True)
    }
    assert {"cluster", "versions agree", "nodes: packages", "nodes: cache", "clocks", "storage", "all-reduce"} <= set(
        found
    )
    assert "2 machines" in found["versions agree"].what  # the node, and this process
    for name in ("cluster", "versions agree", "clocks", "storage", "all-reduce"):
        assert found[name].status == OK, found[name]
    assert "gloo over 2 processes" in found["all-reduce"].what
    assert not list(tmp_path.iterdir())


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_nodes_found_by_address_are_both_asked(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    cluster = Cluster(shutdown_at_exit=False)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
        cluster.wait_for_nodes()
        given = config(cluster.address, storage=str(tmp_path), min_free_gb=0, timeout_s=60)
        found = {one.name: one for one in cluster_checks.check(given)}
    finally:
        cluster.shutdown()
    assert found["cluster"].what.startswith("2 nodes")
    assert "3 machines" in found["versions agree"].what
    assert "from 2 nodes" in found["storage"].what
    assert "2 processes on 2 nodes" in found["all-reduce"].what
    assert found["clocks"].status == OK
    assert os.path.isdir(tmp_path) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_of_this_machine_sum_a_tensor():
    (found,) = all_reduce.here(gpus=0)
    assert found.status == OK and "gloo over 2 processes" in found.what


def test_processes_that_do_not_meet_are_told(monkeypatch):
    assert all_reduce.failed("nccl", 8, "timed out").status == FAILED
    assert "NCCL_SOCKET_IFNAME" in all_reduce.failed("nccl", 8, "timed out").mend
