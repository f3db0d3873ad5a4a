"""A run from its command line to its exit code: mistakes that are refused before a worker starts, and runs that are ended."""

from __future__ import annotations

import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from latentray.checkpoint import manifest
from latentray.config import command
from latentray.config.train import Train
from latentray.training import checkpoint, here, launch, on_ray


@pytest.fixture
def run(tiny, inputs, monkeypatch, capfd):
    """run(*overrides): exit code, standard output and error of a run whose worker, if it comes so far, does `meets`."""

    def run(*overrides: str, stage: int = 2, meets: BaseException | None = None) -> tuple[int, str, str]:
        def start(*_args):
            raise meets or AssertionError("a worker was started")

        for module in (here, on_ray):
            monkeypatch.setattr(module, "train", start)
        given = (
            [*tiny.STAGE1, f"data={inputs['data']}"] if stage == 1 else [*tiny.STAGE2, f"latents={inputs['latents']}"]
        )
        code = command.run("train", Train, launch.train, [*given, *overrides])
        return code, *capfd.readouterr()

    return run


def require_refused(result: tuple[int, str, str], what: str, where: str) -> None:
    code, _, err = result
    assert code == command.USER_MISTAKE, err
    assert err.startswith("error: ") and "Traceback" not in err
    assert what in err and f"  where: {where}" in err and "\n  mend:  " in err


def test_an_output_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for out in (f"{tmp_path}/file/run", "/proc/run", "foo://bucket/run"):
        require_refused(run(f"out={out}"), "Nothing can be written there: ", out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_bucket_that_is_not_there_and_an_endpoint_that_is_dead(run, moto_s3, monkeypatch):
    out = f"s3://{moto_s3.bucket}-other/run"
    require_refused(run(f"out={out}"), "Nothing can be written there: ", out)
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    require_refused(run(f"out={moto_s3.uri('run')}"), "Nothing can be written there: ", moto_s3.uri("run"))


def test_a_run_whose_manifests_are_all_damaged_does_not_begin_again(run, tmp_path):
    for step in (2, 4):
        uri = f"{tmp_path}/run/checkpoints/{step:09d}-aaa"
        manifest.seal(uri, {}, kind="checkpoint", meta={"format": checkpoint.FORMAT, "cursor": {"step": step}})
    files = sorted((tmp_path / "run").rglob("manifest.json"))
    for path in files:
        path.write_bytes(path.read_bytes()[:-9])
    before = {path: path.read_bytes() for path in files}
    result = run(f"out={tmp_path}/run")
    require_refused(result, "All 2 checkpoints of the run are damaged.", f"{tmp_path}/run/checkpoints")
    assert result[1].count("checkpoint passed over: The manifest is damaged") == 2
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_weights_of_the_perceptual_loss_that_are_none(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["stage.lpips.weight=1", "stage.lpips.net=alex", "stage.lpips.weights=some.pth", f"out={tmp_path}/run"]
    require_refused(run(*asked, stage=1), "weights are not there", f"{tmp_path}/some.pth")  # workers start elsewhere
    Path("some.pth").write_bytes(b"no weights")
    require_refused(run(*asked, stage=1), "no weights of torchvision's alex", f"{tmp_path}/some.pth")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_with_a_word_and_the_command_that_resumes(run, tmp_path):
    code, _, err = run(f"out={tmp_path}/run", "run=mine", meets=KeyboardInterrupt())
    assert code == command.INTERRUPTED == 130
    assert err.splitlines()[0] == "The run was interrupted."
    assert "resume it with: python -m jobs.train run=mine" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({}, "python"),
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}, "torchrun --nproc-per-node 8"),
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "32"}, "torchrun --nnodes 4 --nproc-per-node 8"),
    ],
)
def test_the_command_that_resumes_is_the_one_that_began_it_for_any_shell(monkeypatch, environ, launcher):
    given = ["stage=diffusion", "mixture.of=[{uri: a, weight: 1}, {uri: b}]", "run=old", "tracking.name=it's"]
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    if environ:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(sys, "argv", ["train", *given])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", types.SimpleNamespace(name="jobs.train"), raising=False)
    said = launch.resume_command("mine", "/runs/my run")
    assert said.startswith(f"{launcher} -m jobs.train ")
    typed = f"printf '%s\\n' {said.split(' -m jobs.train ', 1)[1]}"
    arguments = subprocess.run(["bash", "-c", typed], capture_output=True, text=True)
    assert arguments.stdout.splitlines() == [given[0], given[1], given[3], "run=mine", "out=/runs/my run"]


def test_ctrl_c_before_a_run_begins_ends_with_a_word(run, tmp_path, monkeypatch):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.preflight, "check", interrupted)
    code, _, err = run(f"out={tmp_path}/run")
    assert (code, err) == (130, "interrupted\n")


def test_help_shows_the_settings_of_the_groups_that_are_chosen(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "Train.")
    shown = {}
    for stage in ("autoencoder", "diffusion"):
        assert command.run("train", Train, launch.train, ["--help", f"stage={stage}"]) == 0
        shown[stage] = capsys.readouterr().out
    assert "\n  name: autoencoder\n" in shown["autoencoder"] and "  lpips:\n" in shown["autoencoder"]
    assert "\n  name: diffusion\n" in shown["diffusion"] and "  lpips:\n" not in shown["diffusion"]
    assert command.run("train", Train, launch.train, ["stage=autoencodr", "-h"]) == 2
    assert "Did you mean stage=autoencoder?" in capsys.readouterr().err
