"""What attention over int8 caches means: the reference of bundles compiled with ``--cache int8``."""

from torch import Tensor

from agq_tvm.quantize.activations import dynamic_codes
from agq_tvm.quantize.forward import float_attention


def attend_int8(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attend with queries, keys and values that are int8 codes, each token and head with a scale of its own.

    Parameters
    ----------
    q : float32 tensor [H, T, D]
    k, v : float32 tensors [KV, T, D]
        As they are; they are rounded here.
    bias : float32 tensor [H, T, T] or None
        Added to scores; masks what a row must not see. None masks and nothing else.

    Returns
    -------
    float32 tensor [H, T, D]
    """
    q, k, v = (codes * scales for codes, scales in map(dynamic_codes, (q, k, v)))
    return float_attention(q, k, v, bias)
