"""What a policy's training leaves: the model folder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.inference import model_folder, policy_folder
from latentray.training.episode_supply import EpisodeSpace
from latentray.training.export import Exported
from latentray.training.feed import Feed
from latentray.training.state import Worker


def model(
    worker: Worker,
    state: Mapping[str, Tensor],
    space: EpisodeSpace,
    feed: Feed,
    *,
    inputs: Mapping[str, str],
    facts: Mapping[str, object],
) -> Exported:
    """Gather denoiser, ranges and sampling defaults into the artifact `<out>/model`."""
    config = worker.config
    defaults = model_folder.SamplingDefaults(
        sampler=config.stage.sampler, steps=config.stage.sampling_steps, guidance_scale=1.0
    )
    samples = feed.order.samples_before(feed.order.steps_to(config.total_samples))
    meta = {"run": worker.run, "samples": samples, **facts}
    uri = store.join(worker.out, "model")
    with store.staging() as folder:
        policy_folder.write(
            folder,
            config=config.denoiser,
            state=state,
            objective=config.objective,
            defaults=defaults,
            observations=space.observations,
            ranges=space.ranges,
            executed=config.policy.executed,
        )
        listing = manifest.publish(
            folder, uri, kind="model", inputs=dict(inputs), config=compose.to_dict(config), meta=meta, replace=True
        )
    return Exported(
        kind="model", uri=uri, digest=listing.digest, inputs=dict(inputs), metrics={}, pictures={}, meta=meta
    )
