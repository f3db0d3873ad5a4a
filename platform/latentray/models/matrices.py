"""Which parameters of a network are matrices between its input and its output: what Muon is meant for."""

from __future__ import annotations

from torch import nn

_MATRIX_NDIM = (2, 4)
"""Linear weights, and convolutions seen as matrices of (out, in x height x width)."""
_HALVES = ("encoder", "decoder")


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """What Muon is meant for (Jordan et al. 2024): the matrices between a network's input and its output.

    What the network, or its encoder and decoder, holds directly is its input, its output and how it takes its conditions;
    embeddings, norms, biases and kernels over one or three axes are no matrices.
    """
    tables = {id(one.weight) for one in module.modules() if isinstance(one, nn.Embedding)}
    found = []
    for name, p in module.named_parameters():
        owner = name.split(".")[:-1]
        inner = owner[1:] if owner and owner[0] in _HALVES else owner
        if p.requires_grad and p.ndim in _MATRIX_NDIM and len(inner) > 1 and id(p) not in tables:
            found.append(p)
    return found
