"""Checksums of parameters in the engine's layout, made where the data lies, piece by piece.

    sum over elements i of bits(x_i) * w(i), modulo 2^64

bits: the element's own bits as a signed integer; w: an odd 64-bit multiplier mixed from the element's place in the
parameter. Any change of a single element changes the sum (an odd w has an inverse); elements in other places, or two
exchanged, change it but for chance. The sum over a parameter is the sum over its parts, so each trainer rank adds up
its own rows and nobody gathers anything. Zeros add nothing, which is what padding holds. """

import torch
from torch import Tensor

from rlhf_worker.weights.plan import Move, View
from rlhf_worker.weights.views import placed

CHUNK = 1 << 20  # elements at a time: six int64 temporaries of them are 50 MB
MASK = (1 << 64) - 1
INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MIX = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9)  # odd constants, as in splitmix64 (Steele, Lea, Flood 2014)


def add(total: Tensor, held: Tensor, move: Move, dtype: torch.dtype) -> None:
    """Add to `total` (an int64 scalar on `held`'s device) the elements that `move` takes from `held` and puts into a
    parameter of `dtype`.
    """
    for part in move.chunks(CHUNK):
        values = placed(held, part.take).to(dtype).contiguous()
        bits = values.view(INTEGER[values.element_size()]).to(torch.int64)
        total += (bits * _weights(part.put, held.device)).sum()


def whole(parameter: Tensor) -> Tensor:
    """Of a contiguous parameter, as an int64 scalar on its device."""
    total = torch.zeros((), dtype=torch.int64, device=parameter.device)
    if parameter.numel():
        view = View(0, (parameter.numel(),), (1,))
        add(total, parameter, Move("", view, "", view), parameter.dtype)
    return total


def _weights(put: View, device: torch.device) -> Tensor:
    """w of each element of the view, in its shape."""
    place = torch.full((), put.offset, dtype=torch.int64, device=device)
    for n, step in zip(put.size, put.stride, strict=True):
        place = place[..., None] + torch.arange(n, device=device) * step
    mixed = (place + 1) * MIX[0]
    mixed ^= mixed >> 31
    mixed *= MIX[1]
    mixed ^= mixed >> 29
    return mixed.bitwise_or_(1)
