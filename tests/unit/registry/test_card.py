"""The card reads as a hub reads it, and states what its figures depend on."""

import dataclasses
import math

import yaml
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


def test_a_card_handed_out_says_what_the_hub_reads_and_how_to_load_it(make_report):
    handout = card.Handout(
        pipeline="StableDiffusionXLPipeline",
        family="stable-diffusion-xl",
        base_model="owner/base",
        prompts=("a red circle: on white", "blue"),
    )
    settings = {"size": 64, "sampling": {"sampler": "ddim", "steps": 20, "guidance_scale": 5.0}}
    text = render(make_report(), license="apache-2.0", handout=handout, settings=settings)
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("diffusers", "text-to-image", "owner/base")
    assert {"stable-diffusion-xl", "latent-diffusion", "latentray", "safetensors"} <= set(data.tags)
    assert len(data.tags) == len(set(data.tags))
    assert yaml.safe_load(text.split("---\n")[1])["widget"] == [{"text": "a red circle: on white"}, {"text": "blue"}]
    assert "StableDiffusionXLPipeline.from_pretrained" in text
    assert "num_inference_steps=20, guidance_scale=5" in text
    assert "| `fid` | 10 | lower |" in text
    refiner = dataclasses.replace(handout, task="image-to-image", base_model=None, prompts=())
    text = render(make_report(), handout=refiner)
    assert "image=picture" in text
    assert not {"base_model", "widget"} & set(yaml.safe_load(text.split("---\n")[1]))


def test_a_model_without_a_report_says_so():
    text = render(None, release="my-model")
    assert "# latentray model my-model" in text
    assert "was not evaluated" in text
    assert "evaluated on" not in text
    assert "promoted" not in text
