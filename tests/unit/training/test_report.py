"""A run's page from its folder, wherever the run was cut off: local or remote, whole or damaged."""

import io
import json

import pytest
import tenacity
from PIL import Image

from latentray.checkpoint import manifest, store
from latentray.checkpoint.manifest import FileEntry
from latentray.tracking import names
from latentray.training import report

CONFIG = {"stage": {"name": "autoencoder"}, "data": "runs/data", "total_samples": 960, "seed": 3}
BEGUN = {
    "run": "first",
    "stage": "autoencoder",
    "config": CONFIG,
    "facts": {"parameters": 7},
    "inputs": {},
    "workers": 2,
}
PICTURE = "pictures/reconstructions-000000960.png"
PLAN = {
    "assumed": {"samples_per_second": 100.0, "hours": 1.0},
    "measured": None,
    "stages": [{"memory": {"total": 2**31}}],
    "zero_stage": 0,
    "checkpoints": {"bytes": 500},
}


def _write_run(out, *, upto=10):
    lines = [
        {
            "samples": 96 * step,
            "time": float(step),
            names.TRAIN_LOSS: 1.0,
            names.TRAIN_SAMPLES_PER_SECOND: 96.0,
            names.TRAIN_PEAK_MEMORY_BYTES: 2**30,
        }
        for step in range(1, upto + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"samples": 99'
    store.write_bytes(store.join(out, "metrics.jsonl"), text.encode())
    store.write_json(store.join(out, "run.json"), BEGUN)
    for samples, color in ((96, "red"), (960, "lime")):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), color).save(buffer, "PNG")
        store.write_bytes(store.join(out, "pictures", f"reconstructions-{samples:09d}.png"), buffer.getvalue())


def _write_checkpoint(out, step=5):
    uri = store.join(out, "checkpoints", f"{step:09d}-abc")
    meta = {"cursor": {"step": step}, "samples": 96 * step}
    files = {"a": FileEntry(size=400, sha256="00"), "b": FileEntry(size=200, sha256="11")}
    return manifest.seal(uri, files, kind="checkpoint", inputs={"dataset": "cafe" * 16}, config=CONFIG, meta=meta)


def _write_result(out):
    uri = store.join(out, "autoencoder")
    inputs = {"dataset": "cafe" * 16}
    return manifest.seal(uri, {}, kind="autoencoder", inputs=inputs, config=CONFIG, meta={"figures": {"psnr": 25.5}})


def _read(out):
    return store.read_bytes(store.join(out, "report.html")).decode()


@pytest.fixture(params=["local", "s3"])
def out(request, tmp_path):
    return str(tmp_path / "first") if request.param == "local" else request.getfixturevalue("moto_s3").uri("first")


def test_a_finished_run_is_told_with_its_result_and_the_plan_beside_it(out, capsys):
    _write_run(out)
    _write_checkpoint(out)
    made = _write_result(out)
    store.write_json(store.join(out, "plan.json"), PLAN)
    assert report.write(out, "finished") == store.join(out, "report.html")
    html = _read(out)
    assert "960 of 960 samples" in html
    assert made.digest in html
    assert "cafe" * 16 in html
    assert "25.5" in html
    assert f"jobs.precompute_latents data=runs/data autoencoder_from={out}/autoencoder" in html
    printed = capsys.readouterr().out
    assert "samples per second: 100 planned, 96 taken" in printed
    assert "peak memory bytes: 2.00 GiB planned, 1.00 GiB taken" in printed
    assert "hours: 1 h 00 min planned, 10 s taken" in printed
    assert "checkpoint bytes: 0.0 MiB planned, 0.0 MiB taken" in printed


def test_a_killed_run_is_told_from_what_it_left(tmp_path, capsys):
    out = str(tmp_path / "first")
    _write_run(out, upto=4)
    _write_checkpoint(out)
    store.write_json(store.join(out, "plan.json"), PLAN)
    report.write(out, "failed", resume="python -m jobs.train run=first lr=1")
    html = _read(out)
    assert "384 of 960 samples" in html
    assert "unfinished run" in html
    assert "cafe" * 16 in html
    assert "checkpoints/000000005-abc" in html
    assert "python -m jobs.train run=first lr=1" in html
    assert "hours" not in capsys.readouterr().out


def test_a_later_page_takes_the_place_of_an_earlier_one_and_shows_the_newest_picture(tmp_path):
    out = str(tmp_path / "first")
    _write_run(out, upto=4)
    report.write(out, "stopped")
    assert "begins anew" in _read(out)
    _write_run(out)
    _write_result(out)
    report.write(out, "finished")
    html = _read(out)
    assert "stopped" not in html
    assert html.count('alt="Originals and reconstructions"') == 1
    found = report._pictures(out)["reconstructions"]
    assert found.getpixel((0, 0)) == (0, 255, 0)


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "plan.json", "autoencoder/manifest.json", PICTURE])
def test_one_damaged_file_does_not_keep_the_page_from_being_written(tmp_path, name):
    out = str(tmp_path / "first")
    _write_run(out)
    _write_result(out)
    store.write_json(store.join(out, "plan.json"), PLAN)
    path = tmp_path / "first" / name
    path.write_bytes(path.read_bytes()[:17] + b"\xff")
    assert report.write(out, "failed") is not None
    assert "</html>" in _read(out)


def test_an_empty_folder_has_a_page_too(tmp_path):
    assert report.write(str(tmp_path), "failed") is not None
    assert "no step was logged" in _read(str(tmp_path))


def test_what_cannot_be_written_is_told_and_does_not_hide_how_the_run_ended(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(store.write_bytes.retry, "wait", tenacity.wait_none())
    (tmp_path / "file").write_text("in the way")
    assert report.write(str(tmp_path / "file"), "failed") is None
    assert "could not be written" in caplog.text


def test_an_unknown_state_is_refused(tmp_path):
    with pytest.raises(ValueError, match="running"):
        report.write(str(tmp_path), "running")
