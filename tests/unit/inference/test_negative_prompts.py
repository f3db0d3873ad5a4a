"""What a negative prompt that nobody gives means: the empty caption, or zeros for a model that learnt so."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from latentray.checkpoint import manifest
from latentray.config.objective import ObjectiveConfig
from latentray.inference import model_folder
from latentray.inference.sampling import SamplingRequest

SIZES = [[16, 16, 0, 0, 16, 16]]


@pytest.fixture(scope="module")
def models(load):
    """Two that differ in this alone."""
    return {zero: load(ObjectiveConfig(prediction="v"), zero_when_empty=zero) for zero in (False, True)}


def drawn(model, **changes) -> torch.Tensor:
    values = dict(prompt="a red circle", steps=3, guidance_scale=3.0, seed=1, sampler="ddim", height=16, width=16)
    return model.latents([SamplingRequest(**(values | changes))])


def test_without_a_word_of_it_the_empty_caption_is_read_and_where_learnt_zeros(models):
    empty = models[True].told([""], SIZES).context_BLD
    assert empty.any()
    assert torch.equal(models[False].told([None], SIZES).context_BLD, empty)
    assert not models[True].told([None], SIZES).context_BLD.any()
    assert torch.equal(models[True].told([""], SIZES).context_BLD, empty)  # not what was kept of None


def test_zeros_are_for_the_negative_prompt_that_is_not_given_alone(models):
    assert torch.equal(drawn(models[False]), drawn(models[False], negative_prompt=""))
    assert not torch.allclose(drawn(models[True]), drawn(models[True], negative_prompt=""), atol=1e-4)
    for changes in (dict(negative_prompt=""), dict(negative_prompt="a blue square"), dict(guidance_scale=1.0)):
        assert torch.equal(drawn(models[True], **changes), drawn(models[False], **changes))


def test_each_request_of_a_batch_has_its_own(models):
    values = dict(prompt="a red circle", steps=2, guidance_scale=3.0, seed=1, sampler="ddim", height=16, width=16)
    asked = [SamplingRequest(**values, negative_prompt=said) for said in (None, "", "a blue square")]
    together = models[True].latents(asked)
    for one, alone in zip(asked, together, strict=True):
        np.testing.assert_allclose(models[True].latents([one])[0], alone, atol=1e-4)


def test_a_model_folder_of_before_reads_the_empty_caption(write_model, tmp_path):
    files = Path(write_model(ObjectiveConfig(), zero_when_empty=True))
    assert model_folder.load(str(files)).zero_when_empty
    config = json.loads((files / "config.json").read_text())
    del config["zero_when_empty"]
    (files / "config.json").write_text(json.dumps(config))
    (files / "manifest.json").unlink()
    manifest.publish(files, tmp_path / "older", kind="model")
    assert not model_folder.load(str(tmp_path / "older")).zero_when_empty
