"""Checkpoints as files: which are found, which are refused and why, which are kept, and whole weights from their parts."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from latentray.checkpoint import manifest, store, weights
from latentray.config import compose
from latentray.config.export import Export
from latentray.config.objective import ObjectiveConfig
from latentray.config.train import Train
from latentray.errors import (
    AlreadyExists,
    ArtifactError,
    ConfigError,
    DigestMismatch,
    FingerprintMismatch,
    InputMissing,
)
from latentray.training import checkpoint, consolidation, loop, partitions
from latentray.training.partitions import Fragment
from latentray.training.state import Worker

WHOLE = {"weight": torch.arange(10.0), "ema": torch.arange(10.0) / 2, "exp_avg": torch.ones(10)}
CONFIG = compose.to_dict(Train(objective=ObjectiveConfig(prediction="v")))
INPUTS = {"latents": "a" * 64}


def write(out: Path, step: int, attempt: str = "aaa", *, sealed: bool = True, config: dict = CONFIG, **meta) -> str:
    """A checkpoint of two ranks."""
    uri = out / "checkpoints" / f"{step:09d}-{attempt}"
    for rank, (start, numel) in enumerate(((0, 6), (6, 4))):
        one = Fragment(name="w", shape=(2, 5), start=start, numel=numel, partition=0, offset=start)
        made = partitions.take([one], {state: [flat] for state, flat in WHOLE.items()}, {"step": float(step)})
        partitions.write(uri / "denoiser" / f"rank_{rank:05d}.safetensors", made)
    if sealed:
        files = {p.relative_to(uri).as_posix(): manifest.entry_of(p) for p in uri.rglob("*.safetensors")}
        about = {"format": 2, "cursor": {"step": step}, "samples": 8 * step, "world": 2, "clock": {}} | meta
        manifest.seal(str(uri), files, kind="checkpoint", inputs=INPUTS, config=config, meta=about)
    return str(uri)


def steps(out: Path) -> list[str]:
    return sorted(store.list_folders(str(out / "checkpoints")))


def test_the_newest_comes_first_and_a_folder_without_a_manifest_does_not_exist(tmp_path):
    for step in (3, 12, 9):
        write(tmp_path, step)
    write(tmp_path, 15, sealed=False)
    assert [saved.step for saved in checkpoint.candidates(str(tmp_path))] == [12, 9, 3]
    assert checkpoint.candidates(str(tmp_path / "elsewhere")) == []


def test_a_damaged_manifest_is_named_and_left_out(tmp_path, capsys):
    write(tmp_path, 3)
    newest = Path(write(tmp_path, 6), manifest.NAME)
    newest.write_text(newest.read_text().replace('"samples": 48', '"samples": 49'))
    assert [saved.step for saved in checkpoint.candidates(str(tmp_path))] == [3]
    assert "checkpoint passed over: The manifest is damaged" in capsys.readouterr().out


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda whole: whole.replace(b'"samples": ', b'"samplez": '),
    "its format": lambda whole: whole.replace(b'"format": 1', b'"format": 3'),
    "cut": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_where_all_manifests_are_damaged_a_run_does_not_begin_again(tmp_path, damage):
    assert checkpoint.require_sound(str(tmp_path)) == []
    listings = [Path(write(tmp_path, step), manifest.NAME) for step in (3, 6)]
    for listing in listings:
        assert checkpoint.require_sound(str(tmp_path)), "one of them is whole"
        whole = listing.read_bytes()
        listing.write_bytes(DAMAGE[damage](whole))
        assert listing.read_bytes() != whole
    with pytest.raises(ArtifactError, match="All 2 checkpoints of the run are damaged") as caught:
        checkpoint.require_sound(str(tmp_path))
    assert caught.value.where == f"{tmp_path}/checkpoints" and "another run=" in caught.value.mend


@pytest.fixture
def one_rank(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def restored(out: str) -> tuple[checkpoint.Saved | None, list[torch.Tensor]]:
    """What a worker goes on from, and the weights that its engine was given."""
    given: list[torch.Tensor] = []
    engine = types.SimpleNamespace(restore=lambda pieces: given.append(pieces.full("weight")["w"]))
    worker = Worker(
        config=compose.from_dict(Train, CONFIG),
        run="r",
        out=out,
        rank=0,
        world=1,
        device=torch.device("cpu"),
        attempt="b",
    )
    ema = types.SimpleNamespace(engine=None)
    return checkpoint.Checkpoints(worker, {"denoiser": engine}, ema, inputs=INPUTS).restore(), given


def test_a_worker_goes_on_from_the_newest_that_is_whole_and_from_zero_only_where_none_is(tmp_path, one_rank, capsys):
    assert restored(str(tmp_path / "new")) == (None, [])
    for step in (3, 6):
        write(tmp_path, step)
    listing = Path(write(tmp_path, 9), manifest.NAME)
    listing.write_bytes(DAMAGE["cut"](listing.read_bytes()))
    part = tmp_path / "checkpoints" / "000000006-aaa" / "denoiser" / "rank_00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    found, given = restored(str(tmp_path))
    assert found is not None and found.step == 3
    assert torch.equal(given[0], WHOLE["weight"].reshape(2, 5))
    assert capsys.readouterr().out.count("checkpoint passed over: ") == 2
    for listing in tmp_path.glob("checkpoints/*/manifest.json"):
        listing.write_bytes(DAMAGE["flipped"](listing.read_bytes()))
    with pytest.raises(ArtifactError, match="All 3 checkpoints"):
        restored(str(tmp_path))


def test_a_worker_keeps_no_copies_of_a_remote_checkpoint(tmp_path, one_rank, moto_s3, monkeypatch):
    cache, local = tmp_path / "cache", tmp_path / "local"
    monkeypatch.setenv("LATENTRAY_CACHE", str(cache))
    write(local, 3)
    for name in store.list_files(local):
        store.upload(local / name, moto_s3.uri("run", name))
    found, given = restored(moto_s3.uri("run"))
    assert found is not None and torch.equal(given[0], WHOLE["weight"].reshape(2, 5))
    assert cache.is_dir() and not list(cache.rglob("*.safetensors"))
    assert restored(moto_s3.uri("run"))[0] is not None, "it is read again from there"


def test_while_one_cannot_be_written_training_goes_on_and_later_ones_are_left_out(tmp_path, one_rank):
    """A store that does not answer holds the thread up, and the loop no longer than it is to wait."""
    config = compose.from_dict(Train, CONFIG | {"faults": CONFIG["faults"] | {"checkpoint_wait_s": 0.2}})
    worker = Worker(
        config=config, run="r", out=str(tmp_path), rank=0, world=1, device=torch.device("cpu"), attempt="now"
    )
    fragment = Fragment(name="w", shape=(2, 5), start=0, numel=10, partition=0, offset=0)
    snapshot = partitions.take([fragment], {state: [flat] for state, flat in WHOLE.items()}, {"step": 3.0})
    engine, ema = types.SimpleNamespace(snapshot=lambda: snapshot), types.SimpleNamespace(engine=None)
    saves = checkpoint.Checkpoints(worker, {"denoiser": engine}, ema, inputs=INPUTS)
    answers = threading.Event()

    def save(step: int, first=lambda: None) -> str | None:
        return saves.save(cursor={"step": step}, samples=8 * step, clock={}, faults={}, first=first)

    held = save(3, answers.wait)
    assert held is not None
    begun = time.perf_counter()
    assert save(6) is None and saves.failures == 1
    assert 0.2 <= time.perf_counter() - begun < 5
    assert save(9) is None and saves.failures == 2
    assert time.perf_counter() - begun < 5, "it waits once"
    assert checkpoint.candidates(str(tmp_path)) == []
    answers.set()
    saves.wait()
    last = save(12)
    saves.wait()
    assert saves.failures == 0 and not saves.failed
    assert [one.uri for one in checkpoint.candidates(str(tmp_path))] == [last, held]


def test_retention_keeps_the_newest_and_pinned_ones_and_removes_what_dead_attempts_left(tmp_path):
    for step in (3, 6, 9, 12):
        write(tmp_path, step)
    store.write_json(store.join(str(tmp_path / "checkpoints" / "000000003-aaa"), checkpoint.PINNED), {})
    write(tmp_path, 14, "dead", sealed=False)
    write(tmp_path, 11, "now", sealed=False)  # the disk was full
    for step in (4, 10):
        listing = Path(write(tmp_path, step, "cut"), manifest.NAME)
        listing.write_bytes(listing.read_bytes()[:-9])
    (tmp_path / "checkpoints" / "000000002-dead").mkdir()  # its last file went when its reader did
    write(tmp_path, 15, "now", sealed=False)
    checkpoint.retain(str(tmp_path), keep=2, attempt="now")
    kept = ["000000003-aaa", "000000009-aaa", "000000010-cut", "000000012-aaa", "000000015-now"]
    assert steps(tmp_path) == kept, "of what is damaged, that which is newer than the oldest kept"


def test_of_other_data_the_newest_is_that_of_most_samples(tmp_path):
    """A larger batch of the data that go on: fewer steps, more samples."""
    for step, samples in ((300, 2400), (400, 3200), (110, 3520)):
        write(tmp_path, step, "now" if step == 110 else "old", samples=samples)
    assert [saved.samples for saved in checkpoint.candidates(str(tmp_path))] == [3520, 3200, 2400]
    checkpoint.retain(str(tmp_path), keep=2, attempt="now")
    assert steps(tmp_path) == ["000000110-now", "000000400-old"]


def saved(tmp_path: Path, **meta) -> checkpoint.Saved:
    write(tmp_path, 3, **meta)
    return checkpoint.candidates(str(tmp_path))[0]


def test_the_same_settings_go_on_at_any_world_size_and_stage(tmp_path):
    checkpoint.require_like(saved(tmp_path, zero_stage=1), CONFIG | {"seed": 1}, INPUTS | {"autoencoder": "b"}, [])


def test_another_commit_is_only_told(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "git_commit", lambda: "b" * 40)
    found = saved(tmp_path)
    assert "written by" not in loop._resumed(found)
    monkeypatch.setattr(manifest, "git_commit", lambda: "c" * 40)
    checkpoint.require_like(found, CONFIG, INPUTS, [])
    assert "at step 3 (written by commit bbbbbbbbbb, this is cccccccccc)" in loop._resumed(found)
    monkeypatch.setattr(manifest, "git_commit", lambda: "")  # no checkout: nobody knows
    assert "written by" not in loop._resumed(found)


def test_settings_that_differ_are_told_with_both_values_and_what_allows_them(tmp_path):
    changed = CONFIG | {
        "optimizer": CONFIG["optimizer"] | {"lr": 3e-4},
        "objective": CONFIG["objective"] | {"prediction": "epsilon"},
    }
    with pytest.raises(FingerprintMismatch) as caught:
        checkpoint.require_like(saved(tmp_path), changed, INPUTS, [])
    assert "objective.prediction: v then, epsilon now" in caught.value.what
    assert "optimizer.lr: 0.0001 then, 0.0003 now" in caught.value.what
    assert "resume.allow=[objective.prediction,optimizer.lr]" in caught.value.mend
    checkpoint.require_like(saved(tmp_path), changed, INPUTS, ["objective.prediction", "optimizer"])


@pytest.mark.parametrize(("key", "now"), [("size", 512), ("crop", "random"), ("ema_half_life_samples", 7)])
def test_other_pictures_and_another_average_are_refused_unless_allowed(tmp_path, key, now):
    found = saved(tmp_path)
    assert CONFIG[key] != now
    with pytest.raises(FingerprintMismatch, match=f"{key}: {CONFIG[key]} then, {now} now"):
        checkpoint.require_like(found, CONFIG | {key: now}, INPUTS, [])
    checkpoint.require_like(found, CONFIG | {key: now}, INPUTS, [key])


def test_a_setting_that_a_newer_version_brought_had_its_default(tmp_path):
    older = {name: value for name, value in CONFIG["optimizer"].items() if name != "decay"}
    write(tmp_path, 3, config=CONFIG | {"optimizer": older})
    (found,) = checkpoint.candidates(str(tmp_path))
    checkpoint.require_like(found, CONFIG, INPUTS, [])
    with pytest.raises(FingerprintMismatch, match="optimizer.decay: constant then, cosine now"):
        checkpoint.require_like(found, CONFIG | {"optimizer": CONFIG["optimizer"] | {"decay": "cosine"}}, INPUTS, [])


def test_other_data_are_refused_unless_allowed(tmp_path):
    with pytest.raises(FingerprintMismatch, match="data: latents aaaaaaaaaaaa then, cccccccccccc now"):
        checkpoint.require_like(saved(tmp_path), CONFIG, {"latents": "c" * 64}, [])
    checkpoint.require_like(saved(tmp_path), CONFIG, {"latents": "c" * 64}, ["data"])


def test_another_format_is_refused(tmp_path):
    with pytest.raises(FingerprintMismatch, match="format 1; this version reads format 2"):
        checkpoint.require_like(saved(tmp_path, format=1), CONFIG, INPUTS, [])


def export(tmp_path: Path, **settings) -> dict[str, torch.Tensor]:
    out = consolidation.export(Export(out=str(tmp_path / "weights"), **settings))
    return weights.read(manifest.fetch_file(out, "denoiser.safetensors", manifest.read(out, kind="weights")))


def test_whole_weights_come_from_the_parts_of_the_newest_and_it_is_kept(tmp_path):
    write(tmp_path, 3)
    write(tmp_path, 6)
    assert torch.equal(export(tmp_path, run=str(tmp_path))["w"], WHOLE["ema"].reshape(2, 5))
    listing = manifest.read(str(tmp_path / "weights"))
    assert listing.meta["step"] == 6 and listing.meta["samples"] == 48
    checkpoint.retain(str(tmp_path), keep=0, attempt="now")
    assert steps(tmp_path) == ["000000006-aaa"]


def test_a_checkpoint_is_kept_before_it_is_read(tmp_path, monkeypatch):
    uri, real = write(tmp_path, 3), manifest.fetch_file
    write(tmp_path, 6)

    def meanwhile(*args):
        checkpoint.retain(str(tmp_path), keep=1, attempt="now")  # the run goes on
        return real(*args)

    monkeypatch.setattr(manifest, "fetch_file", meanwhile)
    assert torch.equal(export(tmp_path, checkpoint=uri)["w"], WHOLE["ema"].reshape(2, 5))
    assert steps(tmp_path) == ["000000003-aaa", "000000006-aaa"]


def test_a_checkpoint_can_be_named_and_its_raw_weights_taken(tmp_path):
    uri = write(tmp_path, 3)
    write(tmp_path, 6)
    assert torch.equal(export(tmp_path, checkpoint=uri, state="weight", pin=False)["w"], WHOLE["weight"].reshape(2, 5))
    with pytest.raises(AlreadyExists):
        export(tmp_path, checkpoint=uri)


def test_every_flipped_bit_and_every_missing_file_is_refused_by_name(tmp_path):
    uri = Path(write(tmp_path, 3))
    for path in sorted(uri.rglob("*.safetensors")):
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(DigestMismatch, match=path.name):
                export(tmp_path, checkpoint=str(uri))
        path.unlink()
        with pytest.raises(DigestMismatch, match=path.name):
            export(tmp_path, checkpoint=str(uri))
        path.write_bytes(whole)
    assert not (tmp_path / "weights").exists()


def test_a_damaged_newest_is_passed_over_and_none_is_told(tmp_path, capsys):
    write(tmp_path, 3)
    part = Path(write(tmp_path, 6), "denoiser", "rank_00001.safetensors")
    part.write_bytes(part.read_bytes()[:-1])
    export(tmp_path, run=str(tmp_path))
    assert "checkpoint passed over" in capsys.readouterr().out
    assert manifest.read(str(tmp_path / "weights")).meta["step"] == 3
    with pytest.raises(InputMissing, match="no checkpoint that is whole"):
        consolidation.export(Export(run=str(tmp_path / "none"), out=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("settings", "where"),
    [({}, "run"), ({"run": "a", "checkpoint": "b"}, "run"), ({"run": "a", "state": "x"}, "state")],
)
def test_bad_settings_are_refused_by_name(settings, where):
    with pytest.raises(ConfigError) as caught:
        Export(out="o", **settings)
    assert caught.value.where == where
