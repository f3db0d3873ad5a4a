"""Checkpoints as files: which are found, which are refused and why, which are kept, and whole weights from their parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentray.checkpoint import manifest, store, weights
from latentray.config import compose
from latentray.config.export import Export
from latentray.config.objective import ObjectiveConfig
from latentray.config.train import Train
from latentray.errors import AlreadyExists, ConfigError, DigestMismatch, FingerprintMismatch, InputMissing
from latentray.training import checkpoint, consolidation, partitions
from latentray.training.partitions import Fragment

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


def test_retention_keeps_the_newest_and_pinned_ones_and_removes_what_dead_attempts_left(tmp_path):
    for step in (3, 6, 9, 12):
        write(tmp_path, step)
    store.write_json(store.join(str(tmp_path / "checkpoints" / "000000003-aaa"), checkpoint.PINNED), {})
    write(tmp_path, 14, "dead", sealed=False)
    write(tmp_path, 15, "now", sealed=False)
    checkpoint.retain(str(tmp_path), keep=2, attempt="now")
    assert steps(tmp_path) == ["000000003-aaa", "000000009-aaa", "000000012-aaa", "000000015-now"]


def saved(tmp_path: Path, **meta) -> checkpoint.Saved:
    write(tmp_path, 3, **meta)
    return checkpoint.candidates(str(tmp_path))[0]


def test_the_same_settings_go_on_at_any_world_size_and_stage(tmp_path):
    checkpoint.require_like(saved(tmp_path, zero_stage=1), CONFIG | {"seed": 1}, INPUTS | {"autoencoder": "b"}, [])


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
