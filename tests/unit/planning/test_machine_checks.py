"""Facts of machines, and what is made of them."""

import copy
import errno
import os
import platform
import socket

import pytest

from latentray.planning import machine, machine_checks
from latentray.planning.findings import FAILED, OK, WARNING, over_nodes

GIB = 1 << 30
GPU = {"name": "NVIDIA H100 80GB HBM3", "driver": "575.57.08", "total": 80 * GIB, "free": 79 * GIB}
GOOD = {
    "versions": {"python": "3.11.7", **dict.fromkeys(machine.PACKAGES, "1.0")},
    "gpus": {"devices": [GPU] * 8, "usable": 8, "torch_cuda": "12.8"},
    "open_files": [1024, 1 << 20],
    "shared_memory": {"path": "/dev/shm", "total": 500 * GIB, "free": 400 * GIB},
    "memory": 1000 * GIB,
    "disks": {"cache": {"path": "/cache", "total": 1000 * GIB, "free": 500 * GIB}},
    "cache": {"path": "/cache", "error": ""},
    "byte_code_off": False,
    "byte_code_folder": "",
}


def facts(**changes):
    return copy.deepcopy(GOOD) | changes


def by_name(*machines):
    named = {f"node-{i}": one for i, one in enumerate(machines)}
    found = [machine_checks.agreeing(named), *machine_checks.check(named, min_free_gb=20)]
    return {one.name: one for one in found}


def test_good_machines_are_good():
    found = by_name(facts(), facts())
    assert {one.status for one in found.values()} == {OK}
    assert not any(one.mend for one in found.values())


def test_facts_of_this_machine_are_facts(tmp_path):
    found = machine.facts(str(tmp_path / "new" / "cache"))
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["ray"] != "missing"
    assert found["cache"] == {"path": str(tmp_path / "new" / "cache"), "error": ""}
    assert not list((tmp_path / "new" / "cache").iterdir())
    assert 0 < found["disks"]["cache"]["free"] <= found["disks"]["cache"]["total"]
    assert set(found) == set(GOOD)
    machine_checks.check({"here": found}, min_free_gb=0)


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    assert machine.write_error(str(tmp_path / "file" / "cache")) == os.strerror(errno.ENOTDIR)
    assert machine.write_error("/proc/latentray")  # root may not either
    found = by_name(facts(cache={"path": "/c", "error": "Read-only file system"}))["cache"]
    assert found.status == FAILED and "Read-only" in found.what and "LATENTRAY_CACHE" in found.mend


def test_differing_versions_are_named_with_their_nodes():
    other = facts(versions=GOOD["versions"] | {"torch": "2.0"})
    found = by_name(facts(), other, facts())["versions agree"]
    assert found.status == FAILED
    assert "torch: 1.0 on node-0 node-2, 2.0 on node-1" in found.what
    minor = facts(versions=GOOD["versions"] | {"numpy": "2.0"})
    assert by_name(facts(), minor)["versions agree"].status == WARNING


def test_a_missing_trainer_is_told():
    found = by_name(facts(versions=GOOD["versions"] | {"deepspeed": "missing"}))["packages"]
    assert found.status == WARNING and "deepspeed missing" in found.what


@pytest.mark.parametrize(
    ("gpus", "status", "says"),
    [
        ({"devices": [], "usable": 0, "torch_cuda": None}, OK, "CPUs"),
        ({"devices": [GPU], "usable": 0, "torch_cuda": None}, FAILED, "CPUs only"),
        ({"devices": [GPU] * 2, "usable": 1, "torch_cuda": "12.8"}, FAILED, "can use 1"),
        ({"devices": [GPU, GPU | {"free": 10 * GIB}], "usable": 2, "torch_cuda": "12.8"}, WARNING, "memory of 1"),
    ],
)
def test_gpus_that_torch_cannot_use_or_others_hold(gpus, status, says):
    found = by_name(facts(gpus=gpus))["GPUs"]
    assert found.status == status and says in found.what


@pytest.mark.parametrize(("free", "status"), [(4, FAILED), (12, WARNING), (300, OK)])
def test_disks(free, status):
    disks = {"cache": {"path": "/c", "total": 100 * GIB if free < 100 else 400 * GIB, "free": free * GIB}}
    assert by_name(facts(disks=disks))["disk space"].status == status


def test_a_containers_64_mib_of_shared_memory_and_few_files_are_told():
    small = {"path": "/dev/shm", "total": 64 << 20, "free": 64 << 20}
    found = by_name(facts(shared_memory=small, open_files=[1024, 1024], byte_code_off=True))
    assert found["shared memory"].status == WARNING and "--shm-size=300g" in found["shared memory"].mend
    assert found["open files"].status == FAILED and "ulimit" in found["open files"].mend
    assert found["byte code"].status == WARNING
    assert by_name(facts(open_files=[1024, 20_000]))["open files"].status == WARNING
    assert by_name(facts(open_files=[1024, -1]))["open files"].status == OK  # without limit


def test_only_the_nodes_that_are_not_well_are_listed():
    found = over_nodes(machine_checks.cache, {"a": facts(), "b": facts(cache={"path": "/c", "error": "full"})})
    assert [one.name for one in found] == ["cache on b"]
    assert "2 more" in over_nodes(machine_checks.cache, dict.fromkeys("abc", facts()))[0].what


def test_a_port_in_use_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert "in use" in machine.port_error(port, "127.0.0.1")
    assert machine.port_error(machine.free_port()) == ""
