"""The card reads as a hub reads it, and states what its figures depend on."""

import math

from huggingface_hub import ModelCard

from latentray.checkpoint.manifest import Manifest
from latentray.registry import card


def render(report, **changes):
    model = Manifest(kind="model", files={}, inputs={"dataset": "d" * 64, "autoencoder": "a" * 64})
    fields = dict(release="r-0123456789ab", model=model, settings={"size": 64}, report=report) | changes
    return card.render(**fields)


def test_the_front_matter_is_the_hubs(make_report):
    data = ModelCard(render(make_report(), license="apache-2.0")).data
    assert (data.license, data.pipeline_tag, data.library_name) == ("apache-2.0", "text-to-image", "latentray")
    assert "latent-diffusion" in data.tags
    assert ModelCard(render(make_report())).data.license_name == "unspecified"


def test_it_states_figures_lineage_and_their_conditions(make_report):
    text = render(make_report())
    assert "| `fid` | 10 | lower |" in text
    assert "a" * 64 in text and "d" * 64 in text
    for stated in (
        "216 pictures",
        "seed 0",
        "`ddim`",
        "20 steps",
        "`net`",
        "resize: bicubic",
        "64x64",
        "r-0123456789ab",
    ):
        assert stated in text
    for section in ("## Figures", "## Lineage", "## Intended use", "## Limits"):
        assert section in text


def test_a_figure_that_is_no_number_is_said_so(make_report):
    assert "| `fid` | not a number | lower |" in render(make_report(metrics={"fid": math.nan}))


def test_it_is_a_pure_function(make_report):
    assert render(make_report()) == render(make_report())
