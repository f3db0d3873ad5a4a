"""`denoiser_from`: what begins what, and what is refused before any worker starts; and clips where pictures are wanted."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from latentray import build
from latentray.checkpoint import manifest, weights
from latentray.config import compose
from latentray.config.denoiser import DenoiserConfig
from latentray.config.train import Train
from latentray.errors import ArtifactError, ConfigError, DigestMismatch, InputMissing
from latentray.models.video import is_temporal
from latentray.training import denoiser_weights, here, launch

NET = ["denoiser.channels=[8,16]", "denoiser.groups=4", "denoiser.heads=2", "denoiser.context_width=16"]
IMAGE, VIDEO = ["denoiser=unet_tiny_sd1", *NET], ["denoiser=video_tiny", *NET]


def load(*overrides: str) -> Train:
    return compose.load("train", Train, ["cluster=none", "tracking=none", *overrides])


def write_model(root: Path, config: DenoiserConfig, *, seed: int = 3, **more: object) -> str:
    """What `denoiser_from` reads of a model folder."""
    (root / "built").mkdir(parents=True)
    state = build.seeded(lambda: build.denoiser(config), seed).state_dict()
    weights.save(root / "built" / "denoiser.safetensors", state)
    (root / "built" / "config.json").write_text(json.dumps({"denoiser": build.as_dict(config)} | more))
    manifest.publish(root / "built", root / "model", kind="model")
    return str(root / "model")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("image"), load(*IMAGE).denoiser)


@pytest.fixture(scope="module")
def clips(tiny, inputs, tmp_path_factory) -> dict[str, str]:
    """`data` and `latents` of clips."""
    path = Path(tiny.__file__).with_name("tiny_clips.py")
    spec = importlib.util.spec_from_file_location("tiny_clips_for_training", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        return module.build_all(tmp_path_factory.mktemp("clips"), patch, tiny, inputs)


def refused(error: type[Exception], *overrides: str) -> Exception:
    with pytest.raises(error) as caught:
        denoiser_weights.find(load(*overrides))
    return caught.value


def test_nothing_named_nothing_found():
    assert denoiser_weights.find(load(*IMAGE)) is None
    assert denoiser_weights.lineage(None) == {}


@pytest.mark.parametrize("settings", [IMAGE, VIDEO], ids=["image", "video"])
def test_an_image_model_begins_an_image_model_and_a_video_model(image, settings):
    config = load(*settings, f"denoiser_from={image}")
    net = build.seeded(lambda: build.denoiser(config.denoiser), 0)
    fresh = {name: value.clone() for name, value in net.state_dict().items() if is_temporal(name)}
    found = denoiser_weights.find(config)
    found.fill(net)
    state = net.state_dict()
    given = weights.read(Path(image) / "denoiser.safetensors")
    assert state.keys() == given.keys() | fresh.keys()
    assert all(torch.equal(state[name], value) for name, value in (given | fresh).items())
    assert bool(fresh) == (settings is VIDEO)
    assert denoiser_weights.lineage(found) == {"denoiser": manifest.read(image).digest}


def test_only_the_layers_over_time_are_left_to_train_where_the_settings_say_so(image):
    config = load(*VIDEO, f"denoiser_from={image}", "denoiser.train_only_temporal=true")
    net = build.denoiser(config.denoiser)
    trained = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    assert trained and all(map(is_temporal, trained))
    whole = denoiser_weights.find(config).beside(trained)
    assert whole.keys() == net.state_dict().keys()


def test_shapes_that_differ_are_refused_with_the_first_key_and_both(image):
    error = refused(ArtifactError, *VIDEO, "denoiser.channels=[8,24]", f"denoiser_from={image}")
    assert error.where == image
    assert "(16," in error.what and "(24," in error.what and "more differ" in error.what
    error = refused(ArtifactError, *IMAGE, "denoiser.blocks=2", f"denoiser_from={image}")
    assert "missing" in error.what or "wanted" in error.what


def test_a_video_model_does_not_begin_an_image_model(tmp_path):
    video = write_model(tmp_path, load(*VIDEO).denoiser)
    assert "temporal_" in refused(ArtifactError, *IMAGE, f"denoiser_from={video}").what


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("denoiser.heads=4", "denoiser.level_heads"),
        ("denoiser.groups=8", "denoiser.groups"),
        ("denoiser.combine=sequence", "denoiser.combine"),
    ],
)
def test_weights_of_equal_shapes_that_mean_something_else_are_refused_by_field(image, override, where):
    settings = [one for one in VIDEO if not one.startswith(override.split("=")[0])]
    assert refused(ConfigError, *settings, override, f"denoiser_from={image}").where == where


def test_a_dropped_caption_is_what_the_model_it_goes_on_from_reads_unless_the_stage_says_otherwise(image, tmp_path):
    config = load(*IMAGE)
    models = {zero: write_model(tmp_path / str(zero), config.denoiser, zero_when_empty=zero) for zero in (True, False)}
    for said, goes_on_from, zero in (
        (None, models[True], True), (None, models[False], False), (None, image, False), (None, None, False),
        (True, models[False], True), (True, None, True), (False, models[True], False),
    ):  # fmt: skip
        config.stage.zero_when_dropped, config.denoiser_from = said, goes_on_from  # `image` is of an older form
        assert denoiser_weights.zero_when_dropped(config) is zero


def test_heads_may_be_said_in_another_way(image):
    settings = [one for one in IMAGE if not one.startswith("denoiser.heads")]
    told = [*settings, "denoiser.heads=null", "denoiser.level_heads=[2,2]", f"denoiser_from={image}"]
    assert denoiser_weights.find(load(*told)) is not None


def test_heads_over_time_are_compared_where_both_have_them(image, tmp_path):
    video = write_model(tmp_path, load(*VIDEO).denoiser)
    more = "denoiser.temporal_heads=4"
    assert refused(ConfigError, *VIDEO, more, f"denoiser_from={video}").where == "denoiser.temporal_heads"
    assert denoiser_weights.find(load(*VIDEO, more, f"denoiser_from={image}")) is not None
    assert denoiser_weights.find(load(*VIDEO, "denoiser.temporal_heads=2", f"denoiser_from={video}")) is not None


def test_what_is_no_model_or_damaged_is_refused(image, inputs, tmp_path):
    assert refused(InputMissing, *IMAGE, "denoiser_from=/nowhere").where == "/nowhere"
    assert "autoencoder" in refused(ArtifactError, *IMAGE, f"denoiser_from={inputs['autoencoder']}").what
    model = Path(write_model(tmp_path, load(*IMAGE).denoiser))
    data = bytearray((model / "denoiser.safetensors").read_bytes())
    data[-3] ^= 1
    (model / "denoiser.safetensors").write_bytes(bytes(data))
    assert refused(DigestMismatch, *IMAGE, f"denoiser_from={model}").where.endswith("denoiser.safetensors")


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ([*VIDEO, "denoiser.train_only_temporal=true"], "denoiser_from"),
        (["stage=autoencoder", "denoiser_from=x"], "denoiser_from"),
        ([*VIDEO, "online.enabled=true", "data=x"], "online.enabled"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_once(overrides, where):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert caught.value.where == where


@pytest.fixture
def not_started(monkeypatch):
    monkeypatch.setattr(here, "train", lambda *_: pytest.fail("a worker was started"))


def test_clips_for_an_image_model_and_pictures_for_a_video_model(tiny, inputs, clips, not_started, tmp_path):
    for settings, latents, said in (
        (tiny.STAGE2, clips["latents"], "clips of 4 frames"),
        ([*tiny.STAGE2, "denoiser.family=video"], inputs["latents"], "have no frames"),
    ):
        given = [*(one for one in settings if one != "denoiser.family=video"), f"latents={latents}"]
        if "denoiser.family=video" in settings:
            given = [one.replace("denoiser=unet_shapes", "denoiser=video_tiny") for one in given]
            given += ["denoiser.heads=null", "denoiser.linear_projection=true"]
        with pytest.raises(ConfigError, match=said) as caught:
            launch.train(compose.load("train", Train, [*given, f"out={tmp_path / 'run'}"]))
        assert caught.value.where.startswith(latents)
        assert not (tmp_path / "run").exists()


def test_clips_and_pictures_are_not_mixed(tiny, inputs, clips, not_started, tmp_path):
    both = f"mixture.of=[{{uri:{inputs['latents']},weight:1}},{{uri:{clips['latents']},weight:1}}]"
    with pytest.raises(ArtifactError) as caught:
        launch.train(compose.load("train", Train, [*tiny.STAGE2, both, f"out={tmp_path / 'run'}"]))
    assert "frames" in caught.value.what
