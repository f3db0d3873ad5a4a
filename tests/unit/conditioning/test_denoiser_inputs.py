"""What a denoiser is told beside noise level: only what it reads, in the order its family was trained on."""

import pytest
import torch

from latentray.conditioning.combination import combine, taken
from latentray.conditioning.denoiser_inputs import AESTHETIC_SCORE, dropped, size_of, told, zeroed
from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError
from latentray.records import Conditions, TextEmbedding

TEXT = TextEmbedding(
    tokens_BLD=torch.zeros(2, 3, 4), mask_BL=torch.ones(2, 3).bool(), pooled_BD=torch.arange(8.0).view(2, 4)
)
SIZE = torch.tensor([[480.0, 640, 8, 16, 512, 512], [64, 64, 0, 0, 64, 64]])


def config(**changes) -> DenoiserConfig:
    return DenoiserConfig(
        **({"channels": [32, 32], "depth": [0, 1], "groups": 8, "heads": 2, "head_dim": None} | changes)
    )


def text(tokens: int, width: int, pooled: int, value: float = 1.0, rows: int = 2) -> TextEmbedding:
    return TextEmbedding(
        tokens_BLD=torch.full((rows, tokens, width), value),
        mask_BL=torch.ones(rows, tokens).bool(),
        pooled_BD=torch.full((rows, pooled), value),
    )


def test_a_network_that_reads_text_alone_is_told_nothing_more():
    found = told(config(), Conditions(texts=(TEXT,), size_B6=SIZE))
    assert found.more == {} and found.context_BLD is TEXT.tokens_BLD and found.channels_BChw is None


def test_a_network_without_text_is_told_none():
    assert told(config(context_width=None), Conditions(texts=(TEXT,))).context_BLD is None


def test_the_base_reads_six_numbers_and_the_refiner_four_and_a_score():
    given = Conditions(texts=(TEXT,), size_B6=SIZE)
    found = told(config(pooled_width=4, size_numbers=6), given).more
    assert found.keys() == {"pooled", "size"}
    assert torch.equal(found["pooled"], TEXT.pooled_BD) and torch.equal(found["size"], SIZE)
    refiner = told(config(pooled_width=4, size_numbers=5), given).more["size"]
    assert refiner.tolist() == [[480, 640, 8, 16, AESTHETIC_SCORE], [64, 64, 0, 0, AESTHETIC_SCORE]]
    asked = told(config(pooled_width=4, size_numbers=5), given, score=2.5).more["size"]
    assert asked[:, 4].tolist() == [2.5, 2.5]


def test_numbers_that_tell_samples_apart_are_not_rounded():
    given = Conditions(texts=(TEXT,), size_B6=SIZE + 1001, labels_B=torch.tensor([997, 998]))
    found = told(config(size_numbers=6, classes=1000, context_width=4), given).to(torch.bfloat16)
    assert torch.equal(found.more["size"], SIZE + 1001) and found.more["labels"].tolist() == [997, 998]
    assert found.context_BLD.dtype == torch.bfloat16
    assert given.to("cpu", torch.bfloat16).labels_B.tolist() == [997, 998]


def test_zeros_take_the_places_of_tokens_and_pooled_text_and_mask_nothing():
    one, other = zeroed([text(3, 4, 4), text(5, 6, 2)])
    assert not any(x.any() for both in (one, other) for x in (both.tokens_BLD, both.pooled_BD))
    assert (one.tokens_BLD.shape, other.pooled_BD.shape) == ((2, 3, 4), (2, 2)) and one.mask_BL.all()


def test_a_picture_drawn_whole_is_its_own_original():
    assert size_of(768, 1024) == [768, 1024, 0, 0, 768, 1024]


def test_sdxl_sets_two_encoders_side_by_side_and_pools_the_second():
    made = combine(config(combine="sdxl"), [text(5, 3, 3, 1.0), text(5, 4, 2, 2.0)])
    assert made.tokens_BLD[0, 0].tolist() == [1, 1, 1, 2, 2, 2, 2] and made.pooled_BD[0].tolist() == [2, 2]


def test_sd3_sets_t5_behind_two_clips():
    made = combine(config(combine="sd3"), [text(5, 3, 3, 1.0), text(5, 4, 2, 2.0), text(6, 9, 0, 3.0)])
    assert made.tokens_BLD.shape == (2, 11, 9) and made.mask_BL.shape == (2, 11)
    assert made.tokens_BLD[0, 0].tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0] and (made.tokens_BLD[:, 5:] == 3).all()
    assert made.pooled_BD[0].tolist() == [1, 1, 1, 2, 2]


def test_a_sequence_fills_up_the_narrow():
    made = combine(config(combine="sequence"), [text(2, 3, 1, 1.0), text(1, 4, 2, 2.0)])
    assert made.tokens_BLD[0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [2, 2, 2, 2]]
    assert made.pooled_BD[0].tolist() == [1, 2, 2]


def test_a_rule_takes_as_many_encoders_as_it_combines():
    counts = {
        rule: [taken(config(combine=rule), there) for there in (3, 4)] for rule in ("one", "sdxl", "sd3", "sequence")
    }
    assert counts == {"one": [1, 1], "sdxl": [2, 2], "sd3": [3, 3], "sequence": [3, 4]}
    assert taken(config(context_width=None), 0) == 0
    for rule, there in (("sd3", 2), ("sdxl", 1), ("one", 0), ("sequence", 0)):
        with pytest.raises(ConfigError) as caught:
            taken(config(combine=rule), there)
        assert caught.value.where == "denoiser.combine"


def test_encoders_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="5 tokens of 3, 4 tokens of 4"):
        combine(config(combine="sdxl"), [text(5, 3, 3), text(4, 4, 2)])


def test_dropout_replaces_all_encoders_and_the_label_or_one_encoder_alone():
    given = Conditions(texts=(text(2, 3, 1, rows=4), text(2, 3, 1, rows=4)), labels_B=torch.tensor([0, 1, 2, 0]))
    empty = Conditions(texts=(text(2, 3, 1, 0.0, rows=1),) * 2, labels_B=torch.tensor([3]))
    none, first, second = torch.zeros(4).bool(), torch.tensor([1, 0, 0, 0]).bool(), torch.tensor([0, 1, 0, 0]).bool()
    got = dropped(given, empty, first, [none, second])
    assert [one.tokens_BLD[:, 0, 0].tolist() for one in got.texts] == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert [one.pooled_BD[:, 0].tolist() for one in got.texts] == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert got.labels_B.tolist() == [3, 1, 2, 0]


def test_the_rows_of_both_passes_go_through_the_network_together():
    one = told(config(pooled_width=4), Conditions(texts=(TEXT,), beside_BChw=torch.ones(2, 2, 5, 5)))
    both = one.rows(torch.tensor([1])).beside(one)
    seen = {}

    def net(x, t, context, **more):
        seen.update(x=x, context=context, **more)
        return x

    both.call(net, torch.zeros(3, 4, 5, 5), torch.zeros(3))
    assert seen["x"].shape == (3, 6, 5, 5) and (seen["x"][:, 4:] == 1).all()
    assert seen["pooled"][:, 0].tolist() == [4, 0, 4] and len(seen["context"]) == 3
