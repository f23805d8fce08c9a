"""The forms in which a profile times a checkpoint's decoder, and which of them is the compiled model's own."""

from dataclasses import dataclass, replace

from agq_tvm.flow.library import linear_format
from agq_tvm.flow.packing import offsets_dtype
from agq_tvm.kernels.attention_form import AttentionForm, attention_form
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.passes.quantize_linears import TABLE_GROUP, LinearFormat
from agq_tvm.quantize.checkpoint import Checkpoint
from agq_tvm.quantize.codebooks import CODE_BOOKS

FLOAT_FORMS = {"float32": 32, "float16-weights": 16}
"""Form: bits of all stored weights. Arithmetic is float32 in both, and caches are float16."""
OWN = "own"
"""The form of a checkpoint that has none of the others."""


@dataclass(frozen=True)
class Form:
    """What linears are stored as and multiplied in, and what attention reads.

    Attributes
    ----------
    name : str
    format : LinearFormat
    isa : InstructionSet
    attention : AttentionForm
    """

    name: str
    format: LinearFormat
    isa: InstructionSet
    attention: AttentionForm


def forms_of(source: Checkpoint, isa: str, cache: str) -> tuple[tuple[Form, ...], str]:
    """List the forms of a checkpoint's decoder: floats, W8A8, W4A8, W4A4 and, if it is none of these, its own.

    Those of integers have the checkpoint's groups, activations, attention and head; float activations give way to
    integer ones.

    Parameters
    ----------
    source : Checkpoint
    isa : str
        Name of the instruction set.
    cache : str
        What keys and values are stored as in forms of integers.

    Returns
    -------
    forms : tuple of Form
    own : str
        The name of that which `agq compile` makes of the checkpoint.
    """
    own = linear_format(source.scheme, offsets_dtype(source))
    roles = tuple(linear.name for linear in source.config.linears)
    grid = own.grid and instruction_set(isa, own.activation).grids  # elsewhere these are scales and offsets like others
    own = replace(own, four_bit=tuple(role for role in roles if role in own.four_bit), grid=grid)
    formats = _integer_formats(own, roles)
    name = next((name for name, format in formats.items() if format == own), OWN)
    book = CODE_BOOKS.get(source.scheme.attention)
    floats = instruction_set(isa, "none")
    forms = [
        Form(name, LinearFormat(bits, TABLE_GROUP, "none", None, head_bits=bits), floats, attention_form(floats))
        for name, bits in FLOAT_FORMS.items()
    ]
    for each, format in (formats | {name: own}).items():
        kernels = instruction_set(isa, format.activation)
        forms.append(Form(each, format, kernels, attention_form(kernels, cache, book)))
    return tuple(forms), name


def _integer_formats(own: LinearFormat, roles: tuple[str, ...]) -> dict[str, LinearFormat]:
    """Return the formats of W8A8, W4A8 and W4A4 that are otherwise like a checkpoint's own."""
    format = replace(own, four_bit=(), shifts=False, mixed=False, grid=False, refined=own.refined and not own.shifts)
    if own.activation == "none":
        format = replace(format, activation="per-token" if own.group_size == "column" else "per-token-group")
    return {
        "w8a8": replace(format, bits=8, offsets=None),
        "w4a8": replace(format, bits=4),
        "w4a4": replace(format, bits=4, four_bit=roles),
    }
