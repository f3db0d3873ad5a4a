"""The second stage of encoding: pictures to latents and captions to embeddings, on the accelerator, in canonical shapes."""

from __future__ import annotations

import torch

from latentray import allocator, build
from latentray.conditioning.encoders import ImageEncoder
from latentray.data import canonical, latents
from latentray.data.canonical import CaptionEmbedder, PictureEmbedder
from latentray.data.latent_parts import FROM_RECORD, Job, Parcel


class Encoder:
    """Autoencoder and text encoders, loaded once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = build.device(job.device)
        if self.device.type == "cpu":
            allocator.keep_freed_memory()
            torch.set_num_threads(1)  # an encoder asks Ray for one core
        self.autoencoder = canonical.load(build.autoencoder_artifact(job.autoencoder), self.device, job.precision)
        loaded = [one.load(self.device) for one in job.texts]
        dtype = getattr(torch, job.text_dtype)
        self.texts = [CaptionEmbedder(one, dtype) for one in loaded if not isinstance(one, ImageEncoder)]
        self.pictures = [PictureEmbedder(one, dtype) for one in loaded if isinstance(one, ImageEncoder)]

    def encode(self, parcel: Parcel) -> Parcel:
        """Pixels become `mean.<store>`, `logvar.<store>` (units, C, h, w); captions `text.<encoder>.tokens` (captions, L, D) ...

        Of clips (units, T, C, h, w). What a vision encoder sees becomes `image.<encoder>.tokens` (units, L, D) ... `about`
        gets `captions`: the order of the embeddings. What was copied passes. Raises DataError for latents that are no numbers.
        """
        tensors = {name: t for name, t in parcel.tensors.items() if name.startswith("kept.")}
        for store in range(self.job.stores):
            if f"pixels.{store}" in parcel.tensors:
                mean, logvar = self.latents(parcel.tensors[f"pixels.{store}"])
                tensors |= {f"mean.{store}": mean, f"logvar.{store}": logvar}
        shown = (unit["json"][0]["captions"] for unit in parcel.about["units"] if unit["from"] != FROM_RECORD)
        captions = list(dict.fromkeys(caption for several in shown for caption in several))
        for embedder in self.texts if captions else ():
            tensors |= latents.text_tensors(embedder.record, embedder.embed(captions), embedder.dtype)
        for of_pictures in self.pictures:
            views = parcel.tensors.get(f"view.{of_pictures.encoder.name}")
            if views is not None:
                tensors |= latents.text_tensors(of_pictures.record, of_pictures.embed(views), of_pictures.dtype)
        return Parcel(about=parcel.about | {"captions": captions}, tensors=tensors)

    @torch.inference_mode()
    def latents(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 pixels (B, H, W, 3) or (B, T, H, W, 3) -> mean and log-variance (B, C, h, w) or (B, T, C, h, w).

        On the CPU, in the stored type. Frames are encoded one by one, as pictures are. Raises DataError for latents that
        are no numbers.
        """
        job, means, logvars = self.job, [], []
        for some in pixels.flatten(0, -4).split(job.batch_size):
            x_BCHW = some.to(self.device).permute(0, 3, 1, 2).contiguous().float().mul_(2 / 255).sub_(1)
            posterior = canonical.encode(
                self.autoencoder,
                x_BCHW,
                batch_size=job.batch_size,
                dtype=getattr(torch, job.latent_dtype),
                where=job.autoencoder,
            )
            means.append(posterior.mean_BChw.cpu())
            logvars.append(posterior.logvar_BChw.cpu())
        mean, logvar = (torch.cat(several).unflatten(0, pixels.shape[:-3]) for several in (means, logvars))
        return mean, logvar
