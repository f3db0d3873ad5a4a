"""The learned text encoder of the first latent diffusion models: a transformer trained together with the denoiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.errors import ConfigError
from latentray.models.attention import attend

_EMBEDDING_STD = 0.02
_HEAD = 64
"""Width of an attention head, whatever the context's."""


class ContextEncoder(nn.Module):
    """Token numbers (B,L,1), whole -> context (B,L,D) (Rombach et al. 2022, section 4.3.1 and appendix E.2.1).

    Embeddings of token and place, then blocks of self-attention over all tokens and a feed-forward, normalised before.
    """

    def __init__(self, *, vocabulary: int, tokens: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=_EMBEDDING_STD)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids_BL1: Tensor) -> Tensor:
        ids_BL = ids_BL1[:, :, 0]
        if ids_BL.shape[1] > self.place.num_embeddings:
            raise ConfigError(
                f"{ids_BL.shape[1]} tokens are more than {self.place.num_embeddings}.",
                where="denoiser.context_tokens",
                mend="Raise it, or lower text_encoder.max_tokens.",
            )
        x = self.token(ids_BL) + self.place(torch.arange(ids_BL.shape[1], device=ids_BL.device))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, heads * _HEAD, bias=False) for _ in range(3))
        self.to_out = nn.Linear(heads * _HEAD, width)
        self.ff_in, self.ff_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        h = self.norm1(x_BLD)
        q, k, v = (
            one(h).unflatten(-1, (self.heads, _HEAD)).transpose(1, 2) for one in (self.to_q, self.to_k, self.to_v)
        )
        x = x_BLD + self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ff_out(F.gelu(self.ff_in(self.norm2(x))))
