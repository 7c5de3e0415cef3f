"""A part of the attention of some rows: what one holder of K/V can say about them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from infinillm.kernels.bodies import Body


class Partial(NamedTuple):
    """Attention over some of the tokens. Parts merge in any order; an empty one changes nothing.

    o    [T, H, D]  the model's dtype; 0 where a row saw nothing
    lse  [T, H]     float32, natural logarithm; -inf where a row saw nothing
    """

    o: Tensor
    lse: Tensor

    @staticmethod
    def empty(tokens: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Partial:
        """The part of a holder that holds nothing: the identity of merge."""
        o = torch.zeros(tokens, heads, dim, dtype=dtype, device=device)
        return Partial(o, torch.full((tokens, heads), float("-inf"), dtype=torch.float32, device=device))


def merge(a: Partial, b: Partial, body: Body) -> Partial:
    """Two parts over disjoint tokens, made one. Commutative, associative up to rounding."""
    return Partial(*body.merge(a.o, a.lse, b.o, b.lse))
