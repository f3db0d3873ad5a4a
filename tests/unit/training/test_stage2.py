"""Which conditions a training sample is told: the draws of caption and encoder dropout, counted."""

import itertools
import types

import pytest
import torch

from latentray import randomness
from latentray.config.train import StageConfig
from latentray.records import Conditions, SampleId, TextEmbedding
from latentray.training.stage2 import DiffusionStage

N, ENCODERS = 8192, 3


def texts(value: float, count: int) -> tuple[TextEmbedding, ...]:
    one = TextEmbedding(
        tokens_BLD=torch.full((count, 1, 1), value),
        mask_BL=torch.ones(count, 1, dtype=torch.bool),
        pooled_BD=torch.full((count, 1), value),
    )
    return (one,) * ENCODERS


def told(*, caption_dropout: float, encoder_dropout: float) -> torch.Tensor:
    """(N, encoders) true where a sample is told what that encoder says of its caption."""
    stage = types.SimpleNamespace(
        stage=StageConfig(caption_dropout=caption_dropout, encoder_dropout=encoder_dropout),
        empty=Conditions(texts=texts(0.0, 1)),
    )
    ids = [SampleId(epoch=0, dataset=0, index=number) for number in range(N)]
    found = DiffusionStage._dropped(
        stage, Conditions(texts=texts(1.0, N)), lambda purpose: randomness.keys_of(5, purpose, ids)
    )
    return torch.stack([one.pooled_BD[:, 0] for one in found.texts], dim=1).bool()


def shares(told_BE: torch.Tensor) -> dict[tuple[bool, ...], float]:
    """Of the samples that are told exactly so."""
    patterns = itertools.product((False, True), repeat=ENCODERS)
    return {one: float((told_BE == torch.tensor(one)).all(1).float().mean()) for one in patterns}


def within(share: float, p: float) -> bool:
    """Five standard deviations of a binomial share."""
    return abs(share - p) < 5 * (p * (1 - p) / N) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.464])
def test_encoders_are_dropped_independently_of_one_another(p):
    for pattern, share in shares(told(caption_dropout=0.0, encoder_dropout=p)).items():
        kept = sum(pattern)
        assert within(share, (1 - p) ** kept * p ** (ENCODERS - kept)), pattern


def test_a_dropped_caption_is_dropped_for_all_encoders():
    found = shares(told(caption_dropout=0.3, encoder_dropout=0.0))
    assert within(found[(False,) * ENCODERS], 0.3)
    assert found[(False,) * ENCODERS] + found[(True,) * ENCODERS] == pytest.approx(1)


def test_both_dropouts_are_independent_of_each_other():
    p, q = 0.2, 0.4
    found = shares(told(caption_dropout=p, encoder_dropout=q))
    assert within(found[(True,) * ENCODERS], (1 - p) * (1 - q) ** ENCODERS)
    assert within(found[(False,) * ENCODERS], p + (1 - p) * q**ENCODERS)
