"""Whole runs of both stages: the number of workers, a kill and a damaged checkpoint change no number."""

import pytest
import torch

STAGES = {"stage1": ["train/loss", "autoencoder/kl", "discriminator/loss"], "stage2": ["train/loss"]}


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("alone", STAGES)
def test_two_workers_follow_the_trajectory_of_one(runs, alone, zero):
    shared = f"{alone}_zero{zero}"
    for name in STAGES[alone]:
        one, two = runs[alone].trajectory(name), runs[shared].trajectory(name)
        assert len(one) == 6
        assert two == pytest.approx(one, rel=1e-4), name
        assert len(set(one)) == 6  # it moves
    assert largest_difference(runs[alone].exported(), runs[shared].exported()) < 5e-4


@pytest.mark.parametrize("name", STAGES)
def test_what_is_exported_is_the_average_and_it_moves(runs, name):
    run = runs[name]
    averaged, raw = run.exported(), run.raw()
    assert largest_difference(averaged, raw) > 1e-4
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in averaged.values())


@pytest.mark.parametrize("name", ["resumed", "damaged"])
def test_a_killed_run_ends_at_the_same_bits(runs, name):
    assert "resumed from" in runs[name].output
    assert largest_difference(runs["stage2"].exported(), runs[name].exported()) == 0.0
    assert largest_difference(runs["stage2"].raw(), runs[name].raw()) == 0.0


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(runs):
    output = runs["damaged"].output
    assert "checkpoint passed over" in output
    assert "denoiser/rank_00000.safetensors" in output
    assert "at step 2" in output
    assert "at step 4" in runs["resumed"].output
    assert "passed over" not in runs["resumed"].output


def test_a_run_goes_on_with_other_workers_and_another_zero_stage(runs):
    """Begun by one worker under ZeRO-2, killed, ended by two under ZeRO-3."""
    assert "at step 4" in runs["moved"].output
    trajectory = runs["moved"].trajectory("train/loss")
    assert trajectory == pytest.approx(runs["stage2"].trajectory("train/loss"), rel=1e-5)
    assert largest_difference(runs["stage2"].raw(), runs["moved"].raw()) < 1e-5


def test_a_resumed_run_logs_every_step_once(runs):
    for name in ("resumed", "damaged"):
        assert runs[name].trajectory("train/loss") == pytest.approx(runs["stage2"].trajectory("train/loss"), rel=1e-6)


def test_the_variance_exploding_case_trains_and_is_drawn_from(runs):
    losses = runs["edm"].trajectory("train/loss")
    assert len(losses) == 12 and all(0 < loss < 5 for loss in losses)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert any(runs["edm"].out.rglob("*samples*.png"))


def test_a_denoiser_that_reads_pooled_text_and_sizes_trains_and_is_drawn_from(runs):
    sizes, without = runs["sizes"].trajectory("train/loss"), runs["stage2"].trajectory("train/loss")
    assert len(sizes) == len(without) and all(0 < loss < 5 for loss in sizes)
    assert sizes != without
    assert runs["sizes"].exported().keys() > runs["stage2"].exported().keys()
    assert any(runs["sizes"].out.rglob("*samples*.png"))


def test_a_mixture_with_a_cut_shard_trains_the_same_on_any_number_of_workers(runs):
    one, two = runs["mixed"], runs["mixed_two"]
    for name in STAGES["stage1"]:
        assert two.trajectory(name) == pytest.approx(one.trajectory(name), rel=1e-3), (
            name
        )  # six steps of an adversarial pair amplify a sum in another order
    damaged = one.trajectory("data/damaged_samples")
    assert damaged == two.trajectory("data/damaged_samples") == sorted(damaged)
    assert damaged[-1] > 2
