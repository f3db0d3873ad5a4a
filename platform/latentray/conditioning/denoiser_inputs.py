"""From conditions to what goes into a denoiser's call: channels, tokens, pooled text, sizes, labels, observations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentray.conditioning.combination import combine
from latentray.config.denoiser import DenoiserConfig
from latentray.records import Conditions, TextEmbedding

_AS_THEY_ARE = ("labels", "size")
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""SDXL's refiner reads a score in the last of its five numbers; what it is asked for, and what guidance leads it away from."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Told:
    """Arguments of a denoiser's call, a row for each sample: what is worked out once, and used in every step."""

    context_BLD: Tensor | None
    more: dict[str, Tensor]
    """Its keyword arguments, by what it reads."""
    channels_BChw: Tensor | None
    """Set beside the noisy latent."""

    def call(self, net: Callable[..., Tensor], x: Tensor, t_B: Tensor) -> Tensor:
        """The network's output for noisy x, (B,C,h,w), (B,T,C,h,w) or (B,T,A)."""
        if self.channels_BChw is not None:
            x = torch.cat([x, self.channels_BChw.to(x)], dim=-3)
        return net(x, t_B, self.context_BLD, **self.more)

    def to(self, dtype: torch.dtype) -> Told:
        """Cast all but labels, sizes and token numbers, which are to be told apart."""
        return Told(
            context_BLD=_cast(self.context_BLD, dtype),
            more={name: value if name in _AS_THEY_ARE else value.to(dtype) for name, value in self.more.items()},
            channels_BChw=self.channels_BChw,
        )

    def read_by(self, read: Callable[[Tensor | None], Tensor | None]) -> Told:
        """With the context that a learned text encoder makes of token numbers (`UNet.read`), once for all steps."""
        return dataclasses.replace(self, context_BLD=read(self.context_BLD))

    def rows(self, index) -> Told:
        """The rows an index or slice selects."""
        return Told(
            context_BLD=None if self.context_BLD is None else self.context_BLD[index],
            more={name: value[index] for name, value in self.more.items()},
            channels_BChw=None if self.channels_BChw is None else self.channels_BChw[index],
        )

    def beside(self, other: Told) -> Told:
        """The rows of both, one after the other."""
        return Told(
            context_BLD=_both(self.context_BLD, other.context_BLD),
            more={name: torch.cat([value, other.more[name]]) for name, value in self.more.items()},
            channels_BChw=_both(self.channels_BChw, other.channels_BChw),
        )


def told(config: DenoiserConfig, given: Conditions, *, score: float = AESTHETIC_SCORE) -> Told:
    """What a denoiser reads of the conditions, and `score` where it reads one.

    Raises ConfigError for encoders that cannot be combined.
    """
    text = combine(config, given.texts)
    more: dict[str, Tensor] = {}
    if "pooled" in config.reads:
        assert text is not None, "refused by the configuration"
        more["pooled"] = text.pooled_BD
    if "size" in config.reads:
        assert given.size_B6 is not None, "refused before the run"
        more["size"] = _numbers(given.size_B6, config.size_numbers, score)
    if "labels" in config.reads:
        assert given.labels_B is not None, "refused before the run"
        more["labels"] = given.labels_B
    if given.observations_BTD is not None:
        more["observations"] = given.observations_BTD
    return Told(context_BLD=None if text is None else text.tokens_BLD, more=more, channels_BChw=given.beside_BChw)


def dropped(given: Conditions, empty: Conditions, all_B: Tensor, each: Sequence[Tensor]) -> Conditions:
    """Conditions, some of them replaced by the empty caption and the null class (Ho & Salimans 2022, algorithm 1).

    Args:
        empty: one row: embeddings of the empty caption, or zeros, and the null class.
        all_B: true where text, by all encoders, and label are dropped.
        each: for each encoder, (B,) true where its embedding alone is dropped.
    """
    texts = tuple(
        _replaced(one, nothing, all_B | alone)
        for one, nothing, alone in zip(given.texts, empty.texts, each, strict=True)
    )
    labels = None if empty.labels_B is None else given.labels_B  # a model without classes is not told those there are
    if labels is not None:
        assert empty.labels_B is not None
        labels = torch.where(all_B, empty.labels_B, labels)
    return dataclasses.replace(given, texts=texts, labels_B=labels)


def zeroed(texts: Sequence[TextEmbedding]) -> tuple[TextEmbedding, ...]:
    """Zeros in place of embeddings: what SDXL's base is told of no prompt, where others are told of the empty one."""
    return tuple(
        dataclasses.replace(one, tokens_BLD=torch.zeros_like(one.tokens_BLD), pooled_BD=torch.zeros_like(one.pooled_BD))
        for one in texts
    )


def size_of(height: int, width: int) -> list[float]:
    """The six numbers of a picture that is drawn whole, at its own size."""
    return [height, width, 0, 0, height, width]


def _replaced(text: TextEmbedding, nothing: TextEmbedding, where_B: Tensor) -> TextEmbedding:
    return TextEmbedding(
        tokens_BLD=torch.where(where_B[:, None, None], nothing.tokens_BLD, text.tokens_BLD),
        mask_BL=torch.where(where_B[:, None], nothing.mask_BL, text.mask_BL),
        pooled_BD=torch.where(where_B[:, None], nothing.pooled_BD, text.pooled_BD),
    )


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else torch.cat([one, other])


def _cast(context_BLD: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return context_BLD if context_BLD is None or not context_BLD.is_floating_point() else context_BLD.to(dtype)


def _numbers(size_B6: Tensor, count: int, score: float) -> Tensor:
    if count == 5:
        return torch.cat([size_B6[:, :4], torch.full_like(size_B6[:, :1], score)], dim=1)
    return size_B6[:, :count]
