"""Every configuration composes and builds; every mistake on a command line is one message, before anything starts."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from latentray import build
from latentray.config import compose, describe
from latentray.config.build_shards import BuildShards
from latentray.config.denoiser import FAMILIES, DenoiserConfig
from latentray.config.doctor import DoctorConfig
from latentray.config.evaluate import Evaluate
from latentray.config.export import Export
from latentray.config.import_weights import ImportWeights
from latentray.config.inspect_shards import InspectShards
from latentray.config.plan import PlanConfig
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.promote import PromoteConfig, ReleasesConfig, RollbackConfig
from latentray.config.quickstart import Quickstart
from latentray.config.sample import Sample
from latentray.config.serve import ServeConfig
from latentray.config.submit import SubmitConfig
from latentray.config.train import Train
from latentray.diffusion import schedules
from latentray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

PRIMARY = {
    "build_shards": (BuildShards, []),
    "doctor": (DoctorConfig, []),
    "export": (Export, ["run=r", "out=o"]),
    "evaluate": (Evaluate, ["model=m", "data=d", "out=o"]),
    "import_weights": (ImportWeights, ["weights=w", "out=o"]),
    "inspect_shards": (InspectShards, ["data=d"]),
    "plan": (PlanConfig, []),
    "precompute_latents": (PrecomputeLatents, ["data=d", "autoencoder_from=a", "out=o"]),
    "promote": (PromoteConfig, ["model=m", "report=r"]),
    "quickstart": (Quickstart, []),
    "releases": (ReleasesConfig, []),
    "rollback": (RollbackConfig, []),
    "sample": (Sample, ["release=r", "prompt=p"]),
    "serve": (ServeConfig, ["allow_anonymous=true"]),
    "submit": (SubmitConfig, ["job=train"]),
    "train": (Train, []),
}
"""Primary configuration -> its schema, and what a user must give."""

GROUPS = {
    "autoencoder": "train",
    "cluster": "train",
    "deepspeed": "train",
    "denoiser": "train",
    "encoders": "precompute_latents",
    "experiment": "train",
    "gates": "promote",
    "objective": "train",
    "optimizer": "train",
    "scale": "quickstart",
    "source": "build_shards",
    "stage": "train",
    "text_encoder": "precompute_latents",
    "tracking": "train",
}
"""Group -> the primary configuration that takes it, or the first of several."""

SHARED = {
    "doctor": {"cluster", "tracking"},
    "plan": {group for group, taker in GROUPS.items() if taker == "train"} | {"encoders"},
    "train": {"encoders"},
}
"""Primary configuration -> groups that it takes besides."""

NEEDS = {
    ("source", "folder"): ["path=p"],
    ("source", "table"): ["path=p"],
    ("source", "webdataset"): ["path=p"],
    ("stage", "classifier"): ["denoiser=classifier_tiny"],
    ("denoiser", "classifier_f8"): ["stage=classifier"],
    ("denoiser", "classifier_tiny"): ["stage=classifier"],
    ("deepspeed", "zero0"): ["precision=autocast"],
    ("optimizer", "adafactor"): ["deepspeed=zero0", "precision=autocast"],
}
"""What a member of a group needs besides."""

MEMBERS = [(group, name) for group, names in compose.groups().items() for name in names]


def load(name: str, *overrides: str):
    schema, needed = PRIMARY[name]
    return compose.load(name, schema, [*needed, *overrides])


def refused(name: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(name, *overrides)
    return caught.value


def test_the_tables_above_are_complete():
    assert sorted(path.stem for path in compose.conf_dir().glob("*.yaml")) == sorted(PRIMARY)
    assert set(compose.groups()) == set(GROUPS)


@pytest.mark.parametrize("name", PRIMARY)
def test_every_job_composes(name):
    config = load(name)
    assert type(config) is PRIMARY[name][0]
    assert compose.from_dict(type(config), compose.to_dict(config)) == config


@pytest.mark.parametrize(("group", "name"), MEMBERS)
def test_every_member_of_every_group_composes(group, name):
    load(GROUPS[group], f"{group}={name}", *NEEDS.get((group, name), []))


@pytest.mark.parametrize("name", compose.groups()["autoencoder"])
def test_every_autoencoder_builds(name):
    config = load("train", f"autoencoder={name}", "stage=autoencoder")
    with torch.device("meta"):
        net = build.autoencoder(config.autoencoder)
    size = config.autoencoder.downsampling * 2
    posterior = net.encode(torch.empty(1, 3, size, size, device="meta"))
    assert posterior.mean_BChw.shape == (1, config.autoencoder.latent_channels, 2, 2)
    assert net.decode(posterior.mean_BChw).shape == (1, 3, size, size)


@pytest.mark.parametrize("name", compose.groups()["denoiser"])
def test_every_denoiser_builds(name):
    config = load("train", f"denoiser={name}", *NEEDS.get(("denoiser", name), [])).denoiser
    with torch.device("meta"):
        net = build.denoiser(config)
        of_picture = ((config.in_channels, 16, 16), (config.out_channels, 16, 16))
        shapes = {
            "video": tuple((3, *one) for one in of_picture),
            "policy": tuple((config.action_steps, one) for one in (config.in_channels, config.out_channels)),
            "classifier": (of_picture[0], (config.classes or 0,)),
        }
        noisy, drawn = shapes.get(config.family, of_picture)
        x, t, context = torch.empty(1, *noisy), torch.empty(1), torch.empty(1, 5, config.context_width or 1)
        conditions = {
            "pooled": torch.empty(1, config.pooled_width or 1),
            "size": torch.empty(1, config.size_numbers),
            "labels": torch.empty(1, dtype=torch.long),
            "observations": torch.empty(1, config.observation_steps, config.observation_width or 1),
        }
        told = {name: conditions[name] for name in config.reads}
        assert net(x, t, context, **told).shape == (1, *drawn)


def test_every_denoiser_lists_the_settings_of_its_family():
    """What a file leaves out cannot be overridden: an mmdit has no levels, a U-Net no patches."""
    kinds = {kind: set() for kind in FAMILIES}
    for name in compose.groups()["denoiser"]:
        told = yaml.safe_load((compose.conf_dir() / "denoiser" / f"{name}.yaml").read_text())
        kinds[told["family"]] |= set(told)
        assert set(told) == kinds[told["family"]]
    assert set.union(*kinds.values()) == {field.name for field in dataclasses.fields(DenoiserConfig)}
    assert refused("train", "denoiser=unet_tiny_sd2", "denoiser.patch=2").where == "denoiser.patch"
    assert refused("train", "denoiser=mmdit_tiny_sd3", "denoiser.channels=[8]").where == "denoiser.channels"


@pytest.mark.parametrize(
    ("name", "members"),
    [("sdxl", ["clip_l_sdxl", "open_clip_bigg"]), ("sd3", ["clip_l_sd3", "open_clip_bigg", "t5_xxl"])],
)
def test_encoders_named_at_once_are_those_named_singly_stored_and_online(name, members):
    stored = load("precompute_latents", f"encoders={name}").all_text_encoders
    assert stored == [load("precompute_latents", f"text_encoder={one}").text_encoder for one in members]
    assert load("train", f"encoders@online={name}").online.all_text_encoders == stored
    experiment = {"sdxl": "sdxl_1024", "sd3": "sd3_medium_1024"}[name]
    assert load("train", f"experiment={experiment}").online.all_text_encoders == stored


@pytest.mark.parametrize("name", compose.groups()["objective"])
def test_every_objective_builds(name):
    config = load("train", f"objective={name}").objective
    alpha, sigma = schedules.build(config).alpha_sigma(torch.tensor([config.timesteps // 2]))
    if config.schedule == "unnoised":
        assert (float(alpha), float(sigma)) == (0, 0)
    else:
        assert 0 < float(alpha) < 1
        assert 0 < float(sigma) < 1


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("unet_sd15", 859_520_964), ("unet_sd2", 865_910_724), ("unet_sdxl", 2_567_463_684),
        ("unet_sdxl_refiner", 2_259_526_660), ("unet_class", 406_730_884), ("mmdit_sd3_medium", 2_028_328_000),
        ("mmdit_sd35_medium", 2_243_171_520), ("mmdit_sd35_large", 8_056_627_520),
        ("video_sd15", 1_206_380_484), ("unet_ldm_text", 1_415_195_844), ("classifier_f8", 70_675_432),
    ],
)  # fmt: skip
def test_the_parameter_counts_of_denoisers(name, parameters):
    with torch.device("meta"):
        needed = NEEDS.get(("denoiser", name), [])
        assert build.parameter_count(build.denoiser(load("train", f"denoiser={name}", *needed).denoiser)) == parameters


def test_the_parameter_count_of_the_autoencoder():
    with torch.device("meta"):
        assert build.parameter_count(build.autoencoder(load("train", "autoencoder=kl_f8").autoencoder)) == 83_653_863


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("total_sample=100", "total_samples"),
        ("optimiser.lr=1", "optimizer.lr"),
        ("optimizer.learning_rat=1", None),
        ("stage.lpips.wieght=1", "stage.lpips.weight"),
        ("autoencodr=kl_f8", "autoencoder"),
        ("deepspeed.zero_stag=1", "deepspeed.zero_stage"),
    ],
)
def test_a_misspelt_key_names_the_nearest(override, nearest):
    error = refused("train", "stage=autoencoder", override)
    key = override.split("=")[0]
    assert error.where == key
    assert key in error.what
    if nearest:
        assert error.mend == f"Did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("override", "where", "takes"),
    [
        ("global_batch_size=many", "global_batch_size", "takes int"),
        ("optimizer.lr=fast", "optimizer.lr", "takes float"),
        ("flip=perhaps", "flip", "takes bool"),
        ("autoencoder.channels=128", "autoencoder.channels", ""),
    ],
)
def test_a_wrong_type_says_what_the_key_takes(override, where, takes):
    error = refused("train", override)
    assert where in f"{error.where} {error.what}"
    assert takes in error.mend


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("denoiser=unet_shape", "denoiser=unet_shapes"),
        ("stage=autoencodr", "stage=autoencoder"),
        ("cluster=slurm", "Known: none, ray"),
    ],
)
def test_an_unknown_member_of_a_group_names_those_there_are(override, hint):
    error = refused("train", override)
    assert hint in error.mend
    assert error.where == override.split("=")[0]


def test_an_unknown_stage_is_refused():
    error = refused("train", "stage.name=super_resolution")
    assert error.where == "stage.name"
    assert "autoencoder, diffusion" in error.mend


@pytest.mark.parametrize(
    ("name", "overrides", "where"),
    [
        ("train", ["cluster.workers=5"], "global_batch_size"),
        ("train", ["global_batch_size=0"], "global_batch_size"),
        ("train", ["total_samples=10"], "total_samples"),
        ("train", ["stage=autoencoder", "size=100"], "size"),
        ("train", ["precision=fp16"], "precision"),
        ("train", ["deepspeed=zero0"], "precision"),
        ("train", ["+deepspeed.extra.train_batch_size=8"], "deepspeed.extra.train_batch_size"),
        (
            "train",
            ["+deepspeed.extra.checkpoint={tag_validations: fail}"],
            "deepspeed.extra.checkpoint.tag_validations",
        ),
        ("train", ["+deepspeed.extra.data_types={grad_dtype: fp32}"], "deepspeed.extra.data_types.grad_dtype"),
        ("train", ["+deepspeed.extra.data_efficiency={seeds: 1}"], "deepspeed.extra.data_efficiency.seeds"),
        ("train", ["objective=flow", "objective.prediction=v"], "objective.prediction"),
        ("train", ["autoencoder.channels=[100]"], "autoencoder.channels"),
        ("train", ["denoiser.depth=[1]"], "denoiser.depth"),
        ("train", ["denoiser.head_dim=64"], "denoiser.head_dim"),
        ("train", ["denoiser.heads=null"], "denoiser.heads"),
        ("train", ["denoiser.heads=7"], "denoiser.heads"),
        ("train", ["denoiser.heads=null", "denoiser.head_dim=7"], "denoiser.head_dim"),
        ("train", ["stage=autoencoder", "stage.lpips.net=resnet"], "stage.lpips.net"),
        ("train", ["stage=autoencoder", "stage.discriminator.channels=4"], "stage.discriminator.channels"),
        ("train", ["stage=classifier"], "denoiser.family"),
        ("train", ["denoiser=classifier_tiny"], "stage.name"),
        ("train", ["stage=classifier", "denoiser=classifier_tiny", "objective=regression"], "objective.schedule"),
        ("train", ["stage=classifier", "denoiser=classifier_tiny", "denoiser_from=m"], "denoiser_from"),
        ("sample", ["classifier=c"], "label"),
        ("sample", ["classifier_scale=2"], "classifier"),
        ("sample", ["label=1", "compare=classifier"], "classifier"),
        ("sample", ["classifier=c", "label=1", "classifier_scale=-1"], "classifier_scale"),
        ("sample", ["classifier=c", "label=1", "refiner=m"], "refiner"),
        ("train", ["tracking.mode=sometimes"], "tracking.mode"),
        ("train", ["micro_batch_size=0"], "micro_batch_size"),
        ("train", ["micro_batch_size=-1"], "micro_batch_size"),
        ("train", ["loader_workers=-1"], "loader_workers"),
        ("train", ["log_every_samples=0"], "log_every_samples"),
        ("train", ["checkpoint_every_samples=-1"], "checkpoint_every_samples"),
        ("train", ["keep_checkpoints=0"], "keep_checkpoints"),
        ("train", ["optimizer.betas=[0.9,1.0]"], "optimizer.betas"),
        ("train", ["optimizer.betas=[-0.1,0.9]"], "optimizer.betas"),
        ("train", ["optimizer.eps=-1e-8"], "optimizer.eps"),
        ("train", ["cluster.threads=0"], "cluster.threads"),
        ("train", ["cluster.collective_timeout_s=0"], "cluster.collective_timeout_s"),
        ("train", ["cluster.resize_every_s=0"], "cluster.resize_every_s"),
        ("precompute_latents", ["data=null"], "data"),
        ("build_shards", ["source=folder"], "path"),
        ("promote", ["model=???"], "model"),
    ],
)
def test_what_contradicts_is_refused_and_names_the_key(name, overrides, where):
    error = refused(name, *overrides)
    assert where in error.where
    assert error.mend


def test_the_divisors_are_named():
    error = refused("train", "global_batch_size=12", "cluster.workers=5")
    assert "1, 2, 3, 4, 6, 12" in error.mend


@pytest.mark.parametrize("broken", ["a=b=", "stage=[", "=3", "foo"])
def test_a_command_line_that_cannot_be_parsed_is_one_message(broken):
    assert refused("train", broken).what


@pytest.mark.parametrize(
    "spelling",
    [
        ["deepspeed.extra={zero_optimization:{overlap_comm:true}}"],
        ["deepspeed.extra.zero_optimization.overlap_comm=true"],
        ["+deepspeed.extra.zero_optimization.overlap_comm=true"],
        ["++deepspeed.extra.zero_optimization.overlap_comm=true"],
        [
            "deepspeed=zero1",
            "deepspeed.extra={zero_optimization:{}}",
            "deepspeed.extra.zero_optimization.overlap_comm=true",
        ],
    ],
)
def test_what_deepspeed_takes_beyond_ours_passes(spelling):
    assert load("train", *spelling).deepspeed.extra == {"zero_optimization": {"overlap_comm": True}}


def test_an_open_mapping_is_checked_however_it_is_spelt():
    for spelling in ("deepspeed.extra={zero_optimisation:{}}", "deepspeed.extra.zero_optimisation={}"):
        assert refused("train", spelling).where.startswith("deepspeed.extra.zero_optimisation")
    assert load("train", "deepspeed.extra={}").deepspeed.extra == {}
    assert load("submit", "env={A_B:c}").env == load("submit", "env.A_B=c").env == {"A_B": "c"}


_RUN = """
import sys
sys.argv = ["jobs.train", *sys.argv[1:]]
from jobs import train
code = train.main()
print("ray imported:", "ray" in sys.modules)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stage=autoencoder", "total_sample=10"], "Did you mean 'total_samples'?"),
        (["stage=autoencoder", "data=/nowhere", "tracking=none"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, arguments, says):
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments, f"out={tmp_path}/run"],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(re.findall(r"^error: ", done.stderr, re.M)) == 1
    assert len(done.stderr.strip().splitlines()) <= 4
    assert "ray imported: False" in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_job_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", "stage=autoencodr"],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no 'stage' called 'autoencodr'.")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", PRIMARY)
def test_help_says_what_each_setting_means_and_offers_only_groups_that_apply(name):
    schema, _ = PRIMARY[name]
    shown = describe.settings(compose.to_plain(compose.compose(name)), schema)
    assert yaml.safe_load(shown) == compose.to_plain(compose.compose(name))
    meanings = describe.docstrings(schema)
    for key in yaml.safe_load(shown):
        if key in meanings:
            assert f"# {meanings[key]}\n{key}:" in shown
    assert set(compose.groups_of(name)) == {
        group for group, taker in GROUPS.items() if taker == name or group in SHARED.get(name, ())
    } - {"debug"}


def test_help_begins_with_the_settings_that_are_no_groups():
    shown = list(yaml.safe_load(describe.settings(compose.to_plain(compose.compose("train")), Train)))
    assert shown[:2] == ["data", "latents"]
    assert shown.index("run") < shown.index("out") < shown.index("stage") < shown.index("denoiser")


def test_a_comma_in_a_prompt_is_told_how_to_be_quoted():
    with pytest.raises(ConfigError) as caught:
        compose.compose("sample", ["prompt=a red, blue circle"])
    assert "twice" in caught.value.mend
    assert compose.compose("sample", ["prompt='a red, blue circle'"]).prompt == "a red, blue circle"
