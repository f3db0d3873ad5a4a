"""Settings of `python -m jobs.train`, for every stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.beside import BesideConfig
from latentray.config.cluster import ClusterConfig
from latentray.config.deepspeed import DeepSpeedConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.faults import FaultsConfig
from latentray.config.feed import CROPS, BucketsConfig, DamageConfig, FetchConfig, MixtureConfig, OrderConfig
from latentray.config.objective import ObjectiveConfig
from latentray.config.online import OnlineConfig
from latentray.config.optimizer import OptimizerConfig
from latentray.config.policy import PolicyConfig
from latentray.config.tracking import TrackingConfig
from latentray.errors import ConfigError

STAGES = ("autoencoder", "diffusion", "classifier")
PRECISIONS = ("fp32", "bf16", "autocast")
LATENTS = ("mean", "draw")
RECONSTRUCTIONS = ("l1", "l2")
LPIPS_NETS = ("vgg", "alex")
TRAINED = ("all", "decoder")
_LEAST = {
    "total_samples": 1, "global_batch_size": 1, "size": 1, "ema_half_life_samples": 1, "keep_checkpoints": 1,
    "log_every_samples": 1, "checkpoint_every_samples": 0, "loader_workers": 0,
}  # fmt: skip
"""Setting -> the least it may be."""


@dataclasses.dataclass(kw_only=True)
class LpipsConfig:
    """The perceptual term of stage 1."""

    net: str = "vgg"
    """vgg or alex."""
    weights: str | None = None
    """Local torchvision state dict of the backbone; null takes it from torch hub, and a random one without network."""
    random_backbone: bool = False
    """Take a random backbone on purpose: no download."""
    weight: float = 1.0
    """Weight of the term; 0 leaves it out."""
    start_samples: int = 0
    """The term counts from this many samples on."""

    def __post_init__(self) -> None:
        if self.net not in LPIPS_NETS:
            raise ConfigError(
                f"There is no LPIPS net {self.net!r}.",
                where="stage.lpips.net",
                mend=f"Known: {', '.join(LPIPS_NETS)}.",
            )
        if self.weights is not None:
            self.weights = str(Path(self.weights).expanduser().absolute())  # workers start in folders of their own


@dataclasses.dataclass(kw_only=True)
class DiscriminatorConfig:
    """The adversarial term of stage 1 (PatchGAN, hinge)."""

    weight: float = 0.5
    """Factor on the adaptive weight; 0 leaves the term and the discriminator out."""
    start_samples: int = 0
    """The discriminator trains and counts from this many samples on."""
    channels: int = 64
    layers: int = 3
    lr: float | None = None
    """Its learning rate; null takes the autoencoder's."""
    max_adaptive_weight: float = 1e4
    """The adaptive weight is clamped to this."""

    def __post_init__(self) -> None:
        if self.channels < 8 or self.channels % 8 or self.layers < 1:
            raise ConfigError(
                f"{self.channels} channels in {self.layers} layers do not divide into its 16 groups.",
                where="stage.discriminator.channels",
                mend="Choose a multiple of 8, and at least one layer.",
            )


@dataclasses.dataclass(kw_only=True)
class CodebookConfig:
    """How a VQ autoencoder learns its codebook: as a moving average of what the encoder gives."""

    commitment: float = 0.25
    """Weight of the squared distance that draws the encoder's output to its vectors."""
    decay: float = 0.99
    """A vector keeps this share of its past at each step."""
    restart_below: float = 0.05
    """A vector that gets less than this share of an even share of the pixels starts anew at one of the encoder's outputs."""

    def __post_init__(self) -> None:
        for key in ("decay", "restart_below"):
            if not 0 < getattr(self, key) < 1:
                raise ConfigError(
                    "It lies outside 0 ... 1.", where=f"stage.codebook.{key}", mend="Leave it out for the default."
                )
        if self.commitment < 0:
            raise ConfigError("It is negative.", where="stage.codebook.commitment", mend="Set it to 0.25, say.")


@dataclasses.dataclass(kw_only=True)
class StageConfig:
    """Which stage, and what belongs to it alone."""

    name: str = "diffusion"
    """autoencoder, diffusion, or classifier: of noisy latents, to guide a denoiser by."""
    reconstruction: str = "l1"
    """Stage 1: l1 or l2."""
    kl_weight: float = 1e-6
    """Stage 1: weight of the KL term, per sample, summed over the latent."""
    codebook: CodebookConfig = dataclasses.field(default_factory=CodebookConfig)
    train_only: str = "all"
    """Stage 1: all, or decoder: the encoder of autoencoder_from stays as it is, and so do latents that it made."""
    lpips: LpipsConfig = dataclasses.field(default_factory=LpipsConfig)
    discriminator: DiscriminatorConfig = dataclasses.field(default_factory=DiscriminatorConfig)
    latent: str = "mean"
    """Stage 2 and classifiers: take the posterior's mean, or draw from it."""
    caption_dropout: float = 0.1
    """Stage 2: share of samples trained on the empty caption, for classifier-free guidance."""
    encoder_dropout: float = 0.0
    """Stage 2: share of samples in which a text encoder, each by itself, embeds the empty caption besides (SD 3: 0.464)."""
    zero_when_dropped: bool | None = None
    """Stage 2: zeros take the empty caption's place (SDXL's base), here and where the model is given no negative prompt; null
    does as the model of denoiser_from, and false without one."""
    sampler: str = "dpmpp_2m"
    """Stage 2: default sampler of the model; also draws the grids logged during training."""
    sampling_steps: int = 30
    guidance_scale: float = 5.0

    def __post_init__(self) -> None:
        for key, known in (
            ("name", STAGES),
            ("reconstruction", RECONSTRUCTIONS),
            ("latent", LATENTS),
            ("train_only", TRAINED),
        ):
            if getattr(self, key) not in known:
                raise ConfigError(
                    f"There is no {key} {getattr(self, key)!r}.",
                    where=f"stage.{key}",
                    mend=f"Known: {', '.join(known)}.",
                )
        for key in ("caption_dropout", "encoder_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError("It lies outside 0 ... 1.", where=f"stage.{key}", mend="Set it to 0.1, say.")


@dataclasses.dataclass(kw_only=True)
class ResumeConfig:
    """What a resumed run may change. World size and ZeRO stage always may; what is learnt, and from what, may not."""

    allow: list[str] = dataclasses.field(default_factory=list)
    """Settings that may differ from those the run began with: `optimizer.lr`, `objective`, or `data` for its inputs."""


@dataclasses.dataclass(kw_only=True)
class Train:
    """Train an autoencoder on pictures, or a denoiser or a classifier on latents: stored ones, or pictures encoded as it goes."""

    stage: StageConfig = dataclasses.field(default_factory=StageConfig)
    autoencoder: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = dataclasses.field(default_factory=DenoiserConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    deepspeed: DeepSpeedConfig = dataclasses.field(default_factory=DeepSpeedConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    data: str | None = None
    """Stage 1, stage 2 with online.enabled, and policies: what build_shards wrote (with train/ and validation/ below)."""
    latents: str | None = None
    """Stage 2: the folder or URI that precompute_latents wrote (with train/ and validation/ below)."""
    autoencoder_from: str | None = None
    """Stage 1: an artifact whose weights it begins with. Stage 2: the autoencoder's artifact, or `identity` for pixels; null
    takes the one the latents name. Its fingerprint must be the latents'. An artifact may be a folder in diffusers' layout too,
    of a pipeline or an AutoencoderKL alone, or a hub id of one: `owner/name`, with `@revision` behind it."""
    denoiser_from: str | None = None
    """Stage 2: the model folder whose denoiser this one goes on from, an image model's for a video denoiser too; or a pipeline's
    folder in diffusers' layout, or its hub id; null begins afresh."""
    online: OnlineConfig = dataclasses.field(default_factory=OnlineConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    beside: BesideConfig = dataclasses.field(default_factory=BesideConfig)
    mixture: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    buckets: BucketsConfig = dataclasses.field(default_factory=BucketsConfig)
    order: OrderConfig = dataclasses.field(default_factory=OrderConfig)
    fetch: FetchConfig = dataclasses.field(default_factory=FetchConfig)
    faults: FaultsConfig = dataclasses.field(default_factory=FaultsConfig)
    resume: ResumeConfig = dataclasses.field(default_factory=ResumeConfig)
    damage: DamageConfig = dataclasses.field(default_factory=DamageConfig)
    run: str | None = None
    """The run's identity: the same id resumes. null makes a new one."""
    out: str | None = None
    """Where the run lies, a path or URI; null is runs/<run>."""
    size: int = 256
    """Stage 1, and stage 2 online: pictures are resized and cut to this square."""
    crop: str = "centre"
    """Stage 1: where they are cut, centre or random."""
    flip: bool = True
    """Stage 1: mirror half of the pictures."""
    total_samples: int = 1_000_000
    """Length of the run."""
    global_batch_size: int = 256
    """Samples per step over all workers."""
    micro_batch_size: int | None = None
    """Largest number of samples a worker takes at once; null is its whole share. Accumulation follows from it."""
    precision: str = "bf16"
    """bf16 (bf16 weights, fp32 master copy; ZeRO stage >= 1), autocast (fp32 weights, bf16 arithmetic) or fp32."""
    compile: bool = False
    """Compile the network (torch.compile): faster steps after a first one of minutes; the workers need a C++ compiler. At
    ZeRO stage 3 DeepSpeed's hooks cut the graph at every layer, and little is gained."""
    ema_half_life_samples: int = 500_000
    """The exponential moving average of the weights halves the past in so many samples."""
    seed: int = 0
    loader_workers: int = 0
    """Loader processes per training worker; 0 reads in the worker itself, as latents on local disks always are."""
    log_every_samples: int = 10_000
    checkpoint_every_samples: int = 100_000
    """0 writes none before the end."""
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"There is no precision {self.precision!r}.", where="precision", mend=f"Known: {', '.join(PRECISIONS)}."
            )
        if self.precision == "bf16" and self.deepspeed.zero_stage == 0:
            raise ConfigError(
                "bf16 weights need a sharded fp32 master copy; ZeRO stage 0 has none that is exact.",
                where="precision",
                mend="Set deepspeed.zero_stage=1 or more, or precision=autocast.",
            )
        self.optimizer.require_stage(self.deepspeed.zero_stage, offloaded=self.deepspeed.offload_optimizer != "none")
        self.deepspeed.require_agreement(clip=self.optimizer.clip, precision=self.precision)
        for key, least in _LEAST.items():
            if getattr(self, key) < least:
                raise ConfigError(f"It must be at least {least}.", where=key, mend=f"Raise {key}.")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ConfigError(
                "A worker takes one sample at least.", where="micro_batch_size", mend="Raise it, or set it to null."
            )
        if self.total_samples < self.global_batch_size:
            raise ConfigError(
                f"{self.total_samples} samples are less than one batch of {self.global_batch_size}.",
                where="total_samples",
                mend="Raise total_samples or lower global_batch_size.",
            )
        if self.crop not in CROPS:
            raise ConfigError(f"There is no crop {self.crop!r}.", where="crop", mend=f"Known: {', '.join(CROPS)}.")
        if self.online.enabled:
            self._check_online()
        elif self.beside.kind != "none":
            raise ConfigError(
                "Masked and small pictures are made while pictures are trained on.",
                where="beside.kind",
                mend="Add stage=diffusion online.enabled=true data=<pictures>, or set it to none.",
            )
        if self.buckets.sizes:
            self._check_buckets()
        if self.order.streams and self.global_batch_size % self.order.streams:
            raise ConfigError(
                f"{self.order.streams} streams do not divide a global batch of {self.global_batch_size}.",
                where="order.streams",
                mend="Use a divisor of global_batch_size, or null for one stream per slot.",
            )
        self._check_family()
        self._check_denoiser_from()
        if self.stage.zero_when_dropped and (self.denoiser.context_layers or not self.denoiser.reads_text):
            raise ConfigError(
                "Zeros take the place of a caption's embeddings, and this denoiser reads none.",
                where="stage.zero_when_dropped",
                mend="Leave it out.",
            )
        if self.reads_episodes:
            self._check_policy()
        if self.mixture.of and (self.data or self.latents):
            raise ConfigError(
                "A mixture names the data sets itself.", where="mixture.of", mend="Leave out data= or latents=."
            )
        if self.mixture.of and self.order.drop_remainder:
            raise ConfigError(
                "The data sets of a mixture have no common epoch whose remainder could be dropped.",
                where="order.drop_remainder",
                mend="Set it to false: what is left is carried over.",
            )
        if self.stage.name == "autoencoder" and self.size % self.autoencoder.downsampling:
            raise ConfigError(
                f"A picture of {self.size} pixels does not divide by the autoencoder's {self.autoencoder.downsampling}.",
                where="size",
                mend=f"Choose a multiple of {self.autoencoder.downsampling}.",
            )
        if self.cluster.kind == "ray":
            self.require_divisible(self.cluster.workers)

    def _check_family(self) -> None:
        classifies, family = self.stage.name == "classifier", self.denoiser.family
        for refused, where, what, mend in (
            (classifies and family != "classifier", "denoiser.family",
             f"A classifier is trained, and the network is of the family {family}.", "Add denoiser=classifier_f8, say."),
            (self.stage.name == "diffusion" and family == "classifier", "stage.name",
             "The network is a classifier, and denoises nothing.", "Add stage=classifier, or give another denoiser."),
            (classifies and self.beside.kind != "none", "beside.kind", "A classifier sees latents alone.",
             "Set it to none."),
            (classifies and self.objective.schedule == "unnoised", "objective.schedule",
             "Without noise and signal there is nothing to classify.", "Give the denoiser's objective."),
        ):  # fmt: skip
            if refused:
                raise ConfigError(what, where=where, mend=mend)

    def _check_denoiser_from(self) -> None:
        if self.denoiser_from is not None and self.stage.name != "diffusion":
            raise ConfigError("Only a denoiser goes on from a model's.", where="denoiser_from", mend="Leave it out.")
        frozen = self.stage.name == "diffusion" and self.denoiser.train_only_temporal
        if frozen and self.denoiser.family == "video" and self.denoiser_from is None:
            raise ConfigError(
                "Layers that are not trained must come from somewhere.",
                where="denoiser_from",
                mend="Give an image model's folder, or set denoiser.train_only_temporal=false.",
            )

    def _check_policy(self) -> None:
        for refused, where, what, mend in (
            (self.latents is not None, "latents", "A policy learns from episodes.", "Give them with data=."),
            (self.online.enabled, "online.enabled", "Episodes are read as they are.", "Leave it out."),
            (self.objective.offset_noise > 0, "objective.offset_noise", "Actions have no brightness.", "Set it to 0."),
            (self.policy.executed > self.denoiser.action_steps, "policy.executed",
             f"Of {self.denoiser.action_steps} actions {self.policy.executed} cannot be executed.",
             "Lower it, or raise denoiser.action_steps."),
        ):  # fmt: skip
            if refused:
                raise ConfigError(what, where=where, mend=mend)

    def _check_online(self) -> None:
        if self.stage.name == "autoencoder":
            raise ConfigError(
                "Stage 1 reads pictures by itself.", where="online.enabled", mend="Set it with another stage only."
            )
        if self.denoiser.family == "video":
            raise ConfigError(
                "Pictures have no frames, and a video denoiser learns from clips.",
                where="online.enabled",
                mend="Precompute latents of clips, and give them with latents=.",
            )
        if self.latents:
            raise ConfigError(
                "Stage 2 reads stored latents, or encodes pictures online.",
                where="latents",
                mend="Leave out latents=, or online.enabled=true.",
            )

    def _check_buckets(self) -> None:
        if not self.reads_pictures:
            raise ConfigError(
                "Stored latents have the shapes they were computed in.",
                where="buckets.sizes",
                mend="Leave it out; stage 1 and online.enabled=true take it.",
            )
        if self.stage.name == "autoencoder" and self.buckets.step % self.autoencoder.downsampling:
            raise ConfigError(
                f"Steps of {self.buckets.step} pixels do not divide by the autoencoder's {self.autoencoder.downsampling}.",
                where="buckets.step",
                mend=f"Choose a multiple of {self.autoencoder.downsampling}.",
            )
        if self.order.streams:
            raise ConfigError(
                "With buckets each batch size has its own streams.", where="order.streams", mend="Leave it null."
            )

    def require_divisible(self, world: int) -> None:
        """Raise ConfigError unless `world` workers, in equal micro-batches, divide every global batch."""
        if self.global_batch_size % world:
            divisors = [str(d) for d in range(1, self.global_batch_size + 1) if self.global_batch_size % d == 0]
            raise ConfigError(
                f"{world} workers do not divide a global batch of {self.global_batch_size}.",
                where="global_batch_size",
                mend=f"Use a number of workers among {', '.join(divisors)}, or another global_batch_size.",
            )
        if self.buckets.sizes:
            self.require_buckets_divisible(world)

    def require_buckets_divisible(self, world: int) -> None:
        """Raise ConfigError unless `world` workers, in equal micro-batches, divide the batches of every bucket."""
        accumulation = self._share(world) // self._micro(world)
        if self.buckets.multiple % (world * accumulation):
            raise ConfigError(
                f"{world} workers in {accumulation} micro-batches do not divide batches that are multiples of "
                f"{self.buckets.multiple}.",
                where="buckets.multiple",
                mend=f"Make it a multiple of {world * accumulation}.",
            )

    @property
    def reads_pictures(self) -> bool:
        """Whether the run's data sets are of pictures, not of latents."""
        return self.stage.name == "autoencoder" or self.online.enabled

    @property
    def reads_episodes(self) -> bool:
        """Whether they are of episodes: a policy's."""
        return self.stage.name == "diffusion" and self.denoiser.family == "policy"

    @property
    def reads_latents(self) -> bool:
        return not (self.reads_pictures or self.reads_episodes)

    def micro_and_accumulation(self, world: int) -> tuple[int, int]:
        """Samples per micro-batch and micro-batches per step of one worker: micro * accumulation * world = global."""
        self.require_divisible(world)
        return self._micro(world), self._share(world) // self._micro(world)

    def _share(self, world: int) -> int:
        return self.global_batch_size // world

    def _micro(self, world: int) -> int:
        share = self._share(world)
        limit = min(self.micro_batch_size or share, share)
        return next(m for m in range(limit, 0, -1) if share % m == 0)
