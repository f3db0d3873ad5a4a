"""What a denoiser is told beside noise level and tokens: only what it reads, in the order SDXL was trained on."""

import torch

from latentray.conditioning.denoiser_inputs import AESTHETIC_SCORE, conditions, size_of
from latentray.config.denoiser import DenoiserConfig
from latentray.records import TextEmbedding

TEXT = TextEmbedding(
    tokens_BLD=torch.zeros(2, 3, 4), mask_BL=torch.ones(2, 3).bool(), pooled_BD=torch.arange(8.0).view(2, 4)
)
SIZE = torch.tensor([[480.0, 640, 8, 16, 512, 512], [64, 64, 0, 0, 64, 64]])


def config(**changes) -> DenoiserConfig:
    return DenoiserConfig(
        **({"channels": [32, 32], "depth": [0, 1], "groups": 8, "heads": 2, "head_dim": None} | changes)
    )


def test_a_network_that_reads_text_alone_is_told_nothing_more():
    assert conditions(config(), TEXT, None) == {}


def test_the_base_reads_six_numbers_and_the_refiner_four_and_a_score():
    told = conditions(config(pooled_width=4, size_numbers=6), TEXT, SIZE)
    assert told.keys() == {"pooled", "size"}
    assert torch.equal(told["pooled"], TEXT.pooled_BD) and torch.equal(told["size"], SIZE)
    refiner = conditions(config(pooled_width=4, size_numbers=5), TEXT, SIZE)["size"]
    assert refiner.tolist() == [[480, 640, 8, 16, AESTHETIC_SCORE], [64, 64, 0, 0, AESTHETIC_SCORE]]


def test_a_picture_drawn_whole_is_its_own_original():
    assert size_of(768, 1024) == [768, 1024, 0, 0, 768, 1024]
