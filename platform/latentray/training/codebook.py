"""How a VQ autoencoder learns its codebook: as the moving average of the encoder's outputs at each vector.

van den Oord et al. 2017, appendix A.1, and Razavi et al. 2019; vectors that are hardly used start anew at one of the
encoder's outputs (Dhariwal et al. 2020, "Jukebox", section 3.2), and so do all of them in the first step. Sums run over
the global batch, in float64, and every rank computes the same: the codebook depends neither on the number of workers, nor
on the ZeRO stage. It is no parameter, and the engine saves it beside its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from latentray import randomness
from latentray.config.train import Train
from latentray.errors import ArtifactError
from latentray.models.autoencoder import VQAutoencoder
from latentray.models.quantizer import Quantizer, perplexity
from latentray.randomness import Purpose
from latentray.records import SampleId
from latentray.training.engine import Engine
from latentray.training.partitions import CODEBOOK, Pieces, Snapshot

"""What a checkpoint's files call it: `codebook/<tensor>`."""
_UPDATES = "codebook_updates"
_FEW = 1e-12
"""Fewer pixels than this have no mean."""


class Codebook:
    """The codebook of a quantiser in training. Every rank sees its own pixels; `update` is collective.

    counts_K and sums_KD are the moving averages of how many pixels fall to a vector, and of their sum; the vector is the
    quotient. average_KD follows the vectors as the EMA of the weights follows those.
    """

    def __init__(self, quantizer: Quantizer, config: Train) -> None:
        self.quantizer, self.settings, self.seed = quantizer, config.stage.codebook, config.seed
        self.batch, self.half_life = config.global_batch_size, config.ema_half_life_samples
        codebook = quantizer.codebook_KD
        self.counts_K = torch.zeros(len(codebook), dtype=torch.float64, device=codebook.device)
        self.sums_KD = torch.zeros(codebook.shape, dtype=torch.float64, device=codebook.device)
        self.average_KD = codebook.clone()
        self.updates = 0
        self.forget()

    def forget(self) -> None:
        """Drop what was observed since the last update: the step was not taken."""
        self._counts, self._sums = torch.zeros_like(self.counts_K), torch.zeros_like(self.sums_KD)
        self._samples = 0
        self._candidates: list[Tensor] = []

    @property
    def unused_K(self) -> Tensor:
        """True at vectors that start anew with the next update."""
        return self.counts_K < self._even_share() * self.settings.restart_below if self.updates else self.counts_K == 0

    @property
    def usage(self) -> Tensor:
        """Share of the vectors that are in use."""
        return (~self.unused_K).double().mean()

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of the vectors' use."""
        return perplexity(self.counts_K)

    def _even_share(self) -> Tensor:
        """Pixels of a step that a vector would get if all got the same."""
        return self.counts_K.mean()

    @torch.no_grad()
    def observe(self, z_BDhw: Tensor, codes_B1hw: Tensor, ids: Sequence[SampleId], weight_B: Tensor) -> None:
        """Count a micro-batch: the encoder's outputs, the vectors they fall to; samples of weight 0 do not count."""
        z_BND = z_BDhw.detach().double().movedim(1, -1).flatten(1, -2)
        weight_BN = weight_B.to(z_BND)[:, None].expand(z_BND.shape[:2])
        codes = codes_B1hw.flatten()
        self._counts.index_add_(0, codes, weight_BN.flatten())
        self._sums.index_add_(0, codes, (z_BND * weight_BN[..., None]).flatten(0, 1))
        self._samples += len(ids)
        if wanted := int(self.unused_K.sum()):
            self._candidates.append(self._drawn(z_BND, ids, weight_B, -(-wanted // self.batch)))

    def _drawn(self, z_BND: Tensor, ids: Sequence[SampleId], weight_B: Tensor, each: int) -> Tensor:
        """(samples * each, 1 + D): pixels drawn from each sample, and before each the draw that ranks it."""
        keys = randomness.keys_of(self.seed, Purpose.CODEBOOK, ids, device=z_BND.device)
        rank_BN = randomness.uniform(keys, (z_BND.shape[1],)).double() * weight_B.to(z_BND)[:, None]
        rank_Bn, at_Bn = rank_BN.topk(min(each, z_BND.shape[1]), dim=1)
        vectors = z_BND.gather(1, at_Bn[..., None].expand(-1, -1, z_BND.shape[-1]))
        return torch.cat([rank_Bn[..., None], vectors], dim=-1).flatten(0, 1)

    @torch.no_grad()
    def update(self) -> None:
        """Move the codebook by what all ranks observed since the last update. Collective."""
        told = torch.cat([self._counts[:, None], self._sums], dim=1)
        dist.all_reduce(told)
        unused = self.unused_K
        self.updates += 1
        decay = min(self.settings.decay, (1 + self.updates) / (10 + self.updates))
        self.counts_K.lerp_(told[:, 0], 1 - decay)
        self.sums_KD.lerp_(told[:, 1:], 1 - decay)
        restarted = self._restart(unused)
        codebook = self.quantizer.codebook_KD
        known = self.counts_K > _FEW
        means = self.sums_KD / self.counts_K.clamp_min(_FEW)[:, None]
        codebook.copy_(torch.where(known[:, None], means.to(codebook.dtype), codebook))
        beta = min(0.5 ** (self.batch / self.half_life), (1 + self.updates) / (10 + self.updates))
        self.average_KD.lerp_(codebook, 1 - beta)
        self.average_KD[restarted] = codebook[restarted]
        self.forget()

    def _restart(self, unused_K: Tensor) -> Tensor:
        """Set unused vectors to drawn pixels, as many as there are; their numbers. Ranks stand one after another, as in the
        global batch, so that the choice is the same at any number of them.
        """
        numbers = unused_K.nonzero()[:, 0]
        if not self._candidates:  # alike on all ranks: they see the same counts
            return numbers[:0]
        mine = torch.cat(self._candidates)
        all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_of_them, mine)
        candidates = torch.cat(all_of_them)
        best = candidates[:, 0].sort(descending=True, stable=True).indices[: len(numbers)]
        best = best[candidates[best, 0] > 0]
        numbers = numbers[: len(best)]
        # Just enough to live on: the first pixels that fall to it decide where it goes, and without any it starts again.
        pixels = self._even_share() * self.settings.restart_below
        self.counts_K[numbers] = pixels
        self.sums_KD[numbers] = candidates[best, 1:] * pixels
        return numbers

    def tensors(self) -> dict[str, Tensor]:
        """All of its state but the number of updates."""
        return {
            "vectors": self.quantizer.codebook_KD,
            "counts": self.counts_K,
            "sums": self.sums_KD,
            "average": self.average_KD,
        }

    def restore(self, pieces: Pieces) -> None:
        """Take over from a checkpoint of any world size and ZeRO stage. Raises ArtifactError where it lacks a codebook."""
        for name, tensor in self.tensors().items():
            saved = pieces.whole(CODEBOOK, name)
            if saved is None or saved.shape != tensor.shape:
                raise ArtifactError(
                    f"The checkpoint has no codebook of {tuple(tensor.shape)} ({name}).",
                    where=pieces.where,
                    mend="Remove this checkpoint; the one before is used then.",
                )
            tensor.copy_(saved)
        self.updates = int(pieces.scalars[_UPDATES])
        self.forget()


class CodebookEngine(Engine):
    """An engine whose network learns a codebook: updated with each step that is taken, saved and restored with the rest."""

    def __init__(self, module: VQAutoencoder, config: Train, **settings: Any) -> None:
        super().__init__(module, config, **settings)
        self.codebook = Codebook(module.quantizer, config)

    def step(self) -> None:
        boundary = self._engine.is_gradient_accumulation_boundary()
        super().step()
        if boundary and self.applied:
            self.codebook.update()
        elif boundary:
            self.codebook.forget()

    def snapshot(self, average: Sequence[Tensor] = ()) -> Snapshot:
        """As an engine's; the codebook, which all ranks hold, is rank 0's to write."""
        made = super().snapshot(average)
        whole: dict[str, Tensor] = {}
        if dist.get_rank() == 0:
            held = self.codebook.tensors()
            whole = {f"{CODEBOOK}/{name}": value.detach().cpu().clone() for name, value in held.items()}
        return dataclasses.replace(
            made, whole=made.whole | whole, scalars=made.scalars | {_UPDATES: float(self.codebook.updates)}
        )

    def restore(self, pieces: Pieces) -> None:
        super().restore(pieces)
        self.codebook.restore(pieces)
