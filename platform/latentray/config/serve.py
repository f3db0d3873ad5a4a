"""Settings of the endpoint: what `jobs.serve` and the Ray Serve application `serving.app:build` take."""

from __future__ import annotations

import dataclasses
import re

from latentray.config.text_encoder import require_precision
from latentray.errors import ConfigError

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(kw_only=True)
class ServeConfig:
    """Which release is served, where, to whom, on how many replicas and within which bounds."""

    registry: str | None = None
    """URI of the model registry; with `alias` it names the release to serve."""
    alias: str = "production"
    """Alias in the registry whose release is served."""
    follow_s: float = 10.0
    """Seconds between looks at the alias by `jobs.serve`, which puts what was promoted in service; 0: never look."""
    release: str | None = None
    """URI of a release (or a trained model) to serve directly, without the registry; on a cluster of its own also a pipeline's
    folder in diffusers' layout, or its hub id `owner/name`, with `@revision` behind it."""
    model_name: str = "latentray"
    """Name clients may give as `model`; the release id and the alias are understood as well."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but a loopback address needs keys."""
    port: int = 8000
    """TCP port of the HTTP endpoint."""
    keys_file: str | None = None
    """URI of a file with one sha256 of a client key per line (`#` starts a comment)."""
    key_hashes: list[str] = dataclasses.field(default_factory=list)
    """sha256 of client keys, as hex; besides these, $LATENTRAY_KEY_HASHES (comma-separated) is read."""
    allow_anonymous: bool = False
    """Answer without a key; only together with a loopback `host`."""

    min_replicas: int = 1
    """Fewest sampler replicas."""
    max_replicas: int = 1
    """Most sampler replicas; Ray Serve scales between the two."""
    target_ongoing_requests: float = 4.0
    """Requests per replica that autoscaling aims for."""
    num_cpus: float = 1.0
    """CPUs reserved for each sampler replica."""
    num_gpus: float = 0.0
    """GPUs reserved for each sampler replica."""
    threads: int | None = None
    """Torch threads of a replica; None leaves torch's and Ray's own choice."""
    device: str = "auto"
    """Device of the sampler: auto, cpu, cuda."""
    offload: bool = False
    """Less GPU memory, more time: each part of the model is on the device for its turn alone; pictures are decoded in strips."""
    classifier: str | None = None
    """URI of a classifier of noisy latents (`stage=classifier`) that fits the release, and those promoted after it: requests that
    give a `label` are drawn to it, as strongly as their `classifier_scale` says, 1 where left out."""
    text_precision: str | None = None
    """fp32 or bf16: what text encoders compute in; null is what the model learnt from. In bf16 SD 3's take 11 GB and not 22."""
    compile: bool = False
    """The denoiser by torch.compile: a replica takes minutes longer to start, and draws faster."""

    max_batch_size: int = 8
    """Most pictures in one sampling call."""
    batch_wait_timeout_s: float = 0.02
    """Seconds the first picture of a batch waits for company."""
    max_n: int = 8
    """Most pictures per request."""
    max_steps: int = 100
    """Most sampling steps per request (the model's own bound applies besides)."""
    max_prompt_chars: int = 4000
    """Longest prompt and negative prompt, in characters."""
    max_queued_requests: int = 32
    """Requests that may wait for a replica, per ingress; beyond it the answer is 429."""
    request_timeout_s: float = 120.0
    """Seconds after which a request is given up with 504."""
    max_body_bytes: int = 8388608
    """Largest request body, the pictures in it included; beyond it the answer is 413."""

    address: str | None = None
    """Ray cluster to deploy to; None starts one on this machine."""
    start_timeout_s: float = 300.0
    """Seconds the endpoint may take to become ready."""
    loader: str = "latentray.inference.sampling:TextToImage.load"
    """Import path of the call `(uri, device=..., offload=..., compile=...)` that loads a release; another serves another
    family."""

    def __post_init__(self) -> None:
        _positive(
            self,
            "target_ongoing_requests max_batch_size max_n max_steps max_prompt_chars request_timeout_s max_body_bytes "
            "start_timeout_s min_replicas",
        )
        if self.text_precision is not None:
            require_precision(self.text_precision, where="text_precision")
        if not 0 < self.port < 65536:
            raise ConfigError(f"port={self.port} is no TCP port.", where="port", mend="Give 1 ... 65535.")
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}.",
                where="max_replicas",
                mend="Raise max_replicas or lower min_replicas.",
            )
        if min(self.batch_wait_timeout_s, self.follow_s, self.num_cpus, self.num_gpus) < 0:
            raise ConfigError(
                "A time or an amount is negative.",
                where="batch_wait_timeout_s, follow_s, num_cpus, num_gpus",
                mend="Give zero or more.",
            )
        if self.threads is not None and self.threads < 1:
            raise ConfigError("threads is below 1.", where="threads", mend="Give 1 or more, or leave it out.")
        if self.max_queued_requests < self.max_ongoing_requests:
            # Serve counts requests waiting for assignment too: a smaller bound refuses bursts an idle replica can take.
            raise ConfigError(
                f"max_queued_requests={self.max_queued_requests} is below the {self.max_ongoing_requests} requests "
                "(2 x max_batch_size) that one replica holds.",
                where="max_queued_requests",
                mend=f"Set max_queued_requests={self.max_ongoing_requests} or more.",
            )
        if any(not _SHA256.fullmatch(h) for h in self.key_hashes):
            raise ConfigError(
                "An entry of key_hashes is no sha256 (64 hex digits).",
                where="key_hashes",
                mend="Give hashes, not keys: printf %s KEY | sha256sum.",
            )

    @property
    def max_ongoing_requests(self) -> int:
        """Requests one replica holds: a batch being drawn and the next one filling."""
        return 2 * self.max_batch_size


def _positive(config: ServeConfig, names: str) -> None:
    for name in names.split():
        if getattr(config, name) <= 0:
            raise ConfigError(
                f"{name}={getattr(config, name)} must be above zero.", where=name, mend=f"Set {name}=1 or more."
            )
