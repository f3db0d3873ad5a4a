"""The job's command line: a mistake is one message and exit code 2, before Ray is even imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentray.config import compose
from latentray.config.build_shards import BuildShards
from latentray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]

RUN = """
import sys
from jobs import build_shards
code = build_shards.main()
print("ray imported" if "ray" in sys.modules else "no ray")
sys.exit(code)
"""


def run(*args: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("case", ["missing", "empty"])
def test_a_wrong_path_exits_with_2_and_starts_no_ray(case, tmp_path):
    path = tmp_path / "pictrues"
    if case == "empty":
        path.mkdir()
    done = run("source=folder", f"path={path}", f"out={tmp_path / 'out'}")
    assert done.returncode == 2, done.stderr
    assert str(path) in done.stderr
    assert "mend:" in done.stderr
    assert "Traceback" not in done.stderr
    assert "no ray" in done.stdout
    assert not (tmp_path / "out").exists()


def test_as_a_module_it_exits_with_2(tmp_path):
    environment = os.environ | {"PYTHONPATH": "platform"}
    command = [sys.executable, "-m", "jobs.build_shards", "source=folder"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "path=" in done.stderr


def test_configs_compose():
    assert compose.load("build_shards", BuildShards).source.name == "shapes"
    table = compose.load("build_shards", BuildShards, ["source=table", "path=a.csv", "source.caption_column=text"])
    assert (table.source.name, table.source.path, table.source.caption_column) == ("table", "a.csv", "text")


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("source.join=row", "source.join"),
        ("source.captions=a.csv source.index_only=true", "source.captions"),
    ],
)
def test_wrong_settings_of_tars_are_named(override, where):
    with pytest.raises(ConfigError) as caught:
        compose.load("build_shards", BuildShards, ["source=webdataset", "path=x", *override.split()])
    assert where in caught.value.where


def test_filters_compose():
    overrides = ["source=table", "path=a.csv", "filter.scores={aesthetic: [5, null]}", "filter.aspect=[0.5,2]"]
    config = compose.load("build_shards", BuildShards, [*overrides, "filter.where=\"'cat' in lower(caption)\""])
    assert config.filter.scores == {"aesthetic": [5, None]}
    assert config.filter.where == "'cat' in lower(caption)"
    assert compose.from_dict(BuildShards, compose.to_dict(config)) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("filter.where=\"open('x')\"", "not allowed"),
        ("filter.where='width >'", "no expression"),
        ("filter.scores={beauty: [5,null]}", "score"),
        ("source.index_only=true", "source.index_only"),
    ],
)
def test_filters_that_cannot_be_applied_exit_with_2_and_start_no_ray(override, says, tmp_path):
    (tmp_path / "t.csv").write_text("path,caption,score\na.png,a,1\n")
    done = run("source=table", f"path={tmp_path / 't.csv'}", f"out={tmp_path / 'out'}", override)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "no ray" in done.stdout


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("samples_per_shard=0", "samples_per_shard"),
        ("max_bad_fraction=1.5", "max_bad_fraction"),
        ("max_pixels=0", "max_pixels"),
        ("source.n=0", "source.n"),
        ("source=table", "path"),
        ("source=webdataset", "path"),
        ("shard_bytes=0", "shard_bytes"),
        ("duplicates=some", "duplicates"),
        ("near_distance=8", "near_distance"),
        ("source.captions=a.csv", "source.captions"),
        ("filter.min_sides=3", "filter.min_sides"),
        ("filter.aspect=[2,1]", "filter.aspect"),
        ("filter.caption_length=[1]", "filter.caption_length"),
        ("filter.scores={aesthetic: [6, 5]}", "filter.scores.aesthetic"),
        ("filter.where='width > 3'", "filter"),  # of the drawn pictures
        ("sampels_per_shard=3", "sampels_per_shard"),
        ("seed=x", "seed"),
    ],
)
def test_wrong_settings_are_named(override, where):
    with pytest.raises(ConfigError) as caught:
        compose.load("build_shards", BuildShards, [override])
    assert where in caught.value.where
