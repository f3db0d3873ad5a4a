"""The records that travel: rows of a text embedding, and casts that leave the mask alone."""

import dataclasses

import pytest
import torch

from latentray.records import SampleId, TextEmbedding


def embedding() -> TextEmbedding:
    return TextEmbedding(
        tokens_BLD=torch.arange(24.0).view(2, 3, 4),
        mask_BL=torch.tensor([[True, True, False], [True, False, False]]),
        pooled_BD=torch.arange(8.0).view(2, 4),
    )


@pytest.mark.parametrize(
    "arguments", [(torch.bfloat16,), ("cpu", torch.bfloat16), (torch.device("cpu"), torch.bfloat16)]
)
def test_a_cast_leaves_the_mask_boolean(arguments):
    cast = embedding().to(*arguments)
    assert cast.tokens_BLD.dtype == cast.pooled_BD.dtype == torch.bfloat16
    assert cast.mask_BL.dtype == torch.bool
    assert torch.equal(cast.mask_BL, embedding().mask_BL)


def test_a_move_takes_the_mask_along():
    moved = embedding().to("meta")
    assert {moved.tokens_BLD.device.type, moved.mask_BL.device.type, moved.pooled_BD.device.type} == {"meta"}


def test_rows_are_cut_from_all_three():
    row = embedding().rows(slice(1, 2))
    assert row.tokens_BLD.shape == (1, 3, 4)
    assert torch.equal(row.tokens_BLD[0], embedding().tokens_BLD[1])
    assert torch.equal(row.mask_BL[0], embedding().mask_BL[1])
    assert torch.equal(row.pooled_BD[0], embedding().pooled_BD[1])


def test_a_sample_id_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SampleId(epoch=0, dataset=0, index=0).index = 1
