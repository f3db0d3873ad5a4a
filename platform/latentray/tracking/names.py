"""Every metric's and picture's name, once. A name is `<part>/<quantity>`; the x axis is always samples seen."""

from __future__ import annotations

TRAIN_LOSS = "train/loss"
TRAIN_LEARNING_RATE = "train/learning_rate"
TRAIN_GRADIENT_NORM = "train/gradient_norm"
TRAIN_SAMPLES_PER_SECOND = "train/samples_per_second"
TRAIN_DATA_WAIT_SHARE = "train/data_wait_share"
"""Share of the step's wall time, 0 to 1, in which the loop waited for data."""
TRAIN_EPOCH = "train/epoch"
TRAIN_PEAK_MEMORY_BYTES = "train/peak_memory_bytes"
"""The most that any worker held since it began: of its GPU, or, on CPUs, of the process."""
TRAIN_DROPPED_STEPS = "train/dropped_steps"
"""Steps of this attempt that were not taken: a loss or gradient was no number, or a spike."""
TRAIN_ROLLBACKS = "train/rollbacks"

RUN_GOODPUT = "run/goodput"
"""Share of the time since the run's first step, over all attempts, that went into steps whose result counts."""
RUN_RESTARTS = "run/restarts"

CHECKPOINT_STALL_SECONDS = "checkpoint/stall_seconds"
"""Seconds that the loop stood still for checkpoints, since the worker began."""
CHECKPOINT_AGE_SECONDS = "checkpoint/age_seconds"

DATA_DAMAGED_SAMPLES = "data/damaged_samples"
"""Samples that could not be read or decoded and were skipped, since the run began, on all ranks."""

DATA_FETCHED_BYTES = "data/fetched_bytes"
"""Bytes of remote shards that came over the network since the workers began, on all ranks; the next three likewise."""
DATA_CACHED_BYTES = "data/cached_bytes"
DATA_FETCH_RETRIES = "data/fetch_retries"
DATA_STALL_SECONDS = "data/stall_seconds"
"""Seconds that loader processes waited because their read-ahead had not come yet."""

AUTOENCODER_RECONSTRUCTION = "autoencoder/reconstruction"
AUTOENCODER_LPIPS = "autoencoder/lpips"
AUTOENCODER_KL = "autoencoder/kl"
AUTOENCODER_COMMITMENT = "autoencoder/commitment"
AUTOENCODER_ADVERSARIAL = "autoencoder/adversarial"
AUTOENCODER_ADAPTIVE_WEIGHT = "autoencoder/adaptive_weight"

CODEBOOK_USAGE = "codebook/usage"
"""Share of a VQ autoencoder's vectors that are in use, 0 to 1."""
CODEBOOK_PERPLEXITY = "codebook/perplexity"
"""exp of the entropy of how often each is used: so many vectors in equal use would be as informative."""

DISCRIMINATOR_LOSS = "discriminator/loss"
DISCRIMINATOR_LOGITS_REAL = "discriminator/logits_real"
DISCRIMINATOR_LOGITS_FAKE = "discriminator/logits_fake"
DISCRIMINATOR_LEARNING_RATE = "discriminator/learning_rate"

CLASSIFIER_ACCURACY = "classifier/accuracy"
"""Share of noisy latents whose class is found, 0 to 1; `accuracy_at` names it for a third of the noise levels."""

VALIDATION_LOSS = "validation/loss"
VALIDATION_PSNR = "validation/psnr"
"""Decibel; mean per picture, values in [0, 1], EMA weights."""
VALIDATION_SSIM = "validation/ssim"
VALIDATION_LPIPS = "validation/lpips"
VALIDATION_RFID = "validation/rfid"
VALIDATION_CODEBOOK_USAGE = "validation/codebook_usage"
"""Share of the vectors that occur in validation pictures."""
VALIDATION_CODEBOOK_PERPLEXITY = "validation/codebook_perplexity"
VALIDATION_FID = "validation/fid"
VALIDATION_KID = "validation/kid"
VALIDATION_ACCURACY = "validation/accuracy"
"""Of a classifier of noisy latents: of held-out latents, over all noise levels alike."""

LATENT_SHIFT = "latent/shift"
LATENT_SCALE = "latent/scale"

SAMPLES_COLOR_ACCURACY = "samples/color_accuracy"
SAMPLES_BACKGROUND_ACCURACY = "samples/background_accuracy"
SAMPLES_SHAPE_ACCURACY = "samples/shape_accuracy"
SAMPLES_HELDOUT_COLOR_ACCURACY = "samples/heldout_color_accuracy"

PICTURES_RECONSTRUCTIONS = "pictures/reconstructions"
PICTURES_SAMPLES = "pictures/samples"


def lost_to(cause: str) -> str:
    """The name of the share of a run's time that was lost to a cause (`training/clock.py`): `run/lost_to/faults`."""
    return f"run/lost_to/{cause}"


def accuracy_at(third: str, *, of: str = CLASSIFIER_ACCURACY) -> str:
    """The name of an accuracy at the low, middle or high third of the noise levels: `classifier/accuracy_at/low`."""
    return f"{of}_at/{third}"


def validation_loss_at(timestep: float) -> str:
    """The name of the held-out loss at one fixed timestep: `validation/loss_at/0500`."""
    return f"{VALIDATION_LOSS}_at/{timestep:04g}"
