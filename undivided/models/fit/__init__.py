"""FIT: local layers on groups of tokens, global layers on a few latents of each group, cross-attention between them.

`FITEncoder` encodes, `FITDenoiser` predicts noise, `FITAutoregressive` predicts the next token. L tokens in T groups of
n with m latents each cost `L n` in local, `L m` in cross and `(T m)^2` in global attention: with m fixed and n about
the cube root of L, `O(L^(4/3))`. No layer sees all L tokens at once, so a step of training keeps memory linear in L.
"""

from __future__ import annotations

from undivided.models.fit._blocks import FITBlock, attention_multiply_adds
from undivided.models.fit.autoregressive import FITAutoregressive, FITState
from undivided.models.fit.denoiser import FITDenoiser
from undivided.models.fit.encoder import FITEncoder

__all__ = [
    "FITAutoregressive",
    "FITBlock",
    "FITDenoiser",
    "FITEncoder",
    "FITState",
    "attention_multiply_adds",
]
