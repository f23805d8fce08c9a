"""Ways to quantize that have a name: what the paper calls its own, what it compares with, and what is best here."""

from types import MappingProxyType

from agq_tvm.errors import AgqError

_AGILEQ_8 = {"method": "gptq", "activation": "static", "max_refine": 6, "attention": "log2-paper"}

VARIANTS = MappingProxyType(
    {
        # Agile-Quant (arXiv 2312.05693): GPTQ, static scales with TRIP, softmax in powers of two.
        "agileq-8": _AGILEQ_8,
        # What follows self-attention has 4-bit inputs.
        "agileq-4": _AGILEQ_8 | {"four_bit": ("o", "gate_up", "down")},
        # Weights alone, and the plain 8-bit form of both.
        "w4a16": {"method": "gptq", "activation": "none"},
        "w8a8": {"weight_bits": 8, "activation": "per-token"},
        # The best found at W4A8: a model's own 4-bit grid is kept, others take GPTQ; small groups, whose scales both
        # weights and activations have.
        "ours": {"group_size": 32, "activation": "per-token-group"},
        # For speed: about the same error of weights, in fewer bits, and no scales inside a product.
        "ours-fast": {"method": "gptq", "group_size": 32, "activation": "per-token", "integer_grid": True},
        # Activations of 4 to 7 bits, 5 on average with their scales.
        "ours-4": {"group_size": 32, "activation": "per-token-group", "mixed_bits": 5.0},
    }
)
"""Arguments of `agq_tvm.flow.quantize.quantize`, by name."""

SIMULATED = "release"
"""What the authors' code does: only `agq_tvm.quantize.release` has it."""


def variant_settings(name: str | None) -> dict:
    """Return the arguments of `agq_tvm.flow.quantize.quantize` that a variant stands for; none for None.

    Raises
    ------
    AgqError
        If there is no such variant, or it cannot be made a checkpoint.
    """
    if name is None:
        return {}
    if name == SIMULATED:
        raise AgqError(
            f"{SIMULATED} has a scale for each channel of an activation, which does not factor out of an integer "
            "product: it is only simulated, by benchmarks.accuracy; choose agileq-8"
        )
    if name not in VARIANTS:
        raise AgqError(f"unknown variant {name!r}: choose one of {', '.join(VARIANTS)}")
    return dict(VARIANTS[name])
