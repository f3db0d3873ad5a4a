"""Models of classes: a class by its number or its name, in a request, in the shell, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.config.sample import Sample
from latentray.errors import ConfigError
from latentray.inference.examples import example
from latentray.inference.requests import label_of

NAMES = ("ape", "tench", "zebra")


@pytest.fixture(scope="module")
def model(load):
    of_classes = DenoiserConfig(
        channels=[8, 8], blocks=1, depth=[1, 0], heads=2, context_width=None, groups=4, classes=3
    )
    loaded = load(ObjectiveConfig(prediction="v"), denoiser=of_classes)
    loaded.model.classes = NAMES
    return loaded


def test_a_class_is_given_by_number_or_name():
    assert [label_of(one, 3, NAMES) for one in (0, "2", "tench")] == [0, 2, 1]
    assert label_of("7", 8) == 7


@pytest.mark.parametrize(
    ("wanted", "classes", "told"),
    [(3, 3, "0 to 2"), ("-1", 3, "0 to 2"), (-1, 3, "0 to 2"), ("tenhc", 3, "mean tench"), ("ape", None, "Leave")],
)
def test_a_class_that_is_not_known_is_refused(wanted, classes, told):
    with pytest.raises(ConfigError) as caught:
        label_of(wanted, classes, NAMES)
    assert caught.value.where == "label" and told in caught.value.mend


def test_each_class_is_drawn_as_told_whatever_is_beside_it(model):
    asked = [example(model, "", seed=4, label=label) for label in (0, 1, None)]
    together = model.latents(asked)
    assert (together[0] - together[1]).abs().max() > 1e-4 and (together[0] - together[2]).abs().max() > 1e-4
    np.testing.assert_allclose(model.latents(asked[1:2])[0], together[1], atol=1e-4)
    assert model.name_of(1) == "tench" and (model.classes, model.class_names) == (3, NAMES)


def test_labels_reach_the_network_guided_against_the_null_class(model):
    told = model.told(["", ""], [[16, 16, 0, 0, 16, 16]] * 2, labels=[2, None])
    assert told.context_BLD is None and told.more["labels"].tolist() == [2, 3]
    with pytest.raises(ConfigError, match="no class 3"):
        model.told([""], [[16, 16, 0, 0, 16, 16]], labels=[3])
    with pytest.raises(ConfigError, match="no class 9"):
        model.check(dataclasses.replace(example(model, "", seed=0), label=9))


def test_a_label_needs_no_prompt_in_the_shell():
    assert Sample(release="r", label="3").prompt == ""
    assert Sample(release="r", label="ape", prompt="an ape").prompt == "an ape"
    with pytest.raises(ConfigError):
        Sample(release="r")


def test_a_classifier_of_noisy_latents_draws_to_its_class(model):
    """A made one, that takes the sign of a latent's mean for its class: p(1 | x) = sigmoid(8 mean)."""

    def classify(x_BChw, t_B, labels_B):
        sides = 2.0 * labels_B.to(x_BChw) - 1
        return torch.nn.functional.logsigmoid(8 * sides * x_BChw.flatten(1).mean(1))

    asked = [
        dataclasses.replace(
            example(model, "", seed=4, label=label), guidance_scale=1.0, classifier_scale=scale, steps=8
        )
        for label, scale in ((0, 0.0), (0, 60.0), (1, 0.0), (1, 60.0))
    ]
    with pytest.raises(ConfigError, match="no classifier") as caught:
        model.check(asked[1])
    assert caught.value.where == "classifier_scale"
    model.classifier = classify
    try:
        means = model.latents(asked).flatten(1).mean(1)
        alone = model.latents(asked[1:2]).flatten(1).mean(1)
        with pytest.raises(ConfigError, match="draws to a class"):
            model.check(dataclasses.replace(asked[1], label=None))
    finally:
        model.classifier = None
    assert means[1] < means[0] - 0.01 and means[3] > means[2] + 0.01
    torch.testing.assert_close(alone[0], means[1], rtol=1e-3, atol=1e-4)
