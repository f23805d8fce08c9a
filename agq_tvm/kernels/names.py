"""The grammar of kernel names, and its parser. docs/kernels.md has it in words.

product   = [ "agq." ] operation "." instruction-set "." layout [ ".a4" ] [ "." form ] ".m" rows [ tuned ]
operation = [ "shift_" ] ( "dot" | "loops" ) | "grid_dot" | "grid_unpack" | [ "grid_" ] "panels" | "floats"
layout    = sign bits "_v" vectors "x" lanes "_k" depth        sign = "u" | "s"
form      = "packed" | "bytes"
tuned     = [ ".of" vectors ] [ ".ahead" blocks ]
function  = word { "_" word } { "_" size }
size      = letters number                                     letters: see `SIZES`
"""

import re

from agq_tvm.errors import AgqError

SIZES = {
    "m": "rows",
    "n": "columns",
    "k": "channels",
    "g": "group size",
    "h": "heads",
    "kv": "key and value heads",
    "d": "channels of a head",
    "c": "context",
    "to_": "rows that are left",
    "segment": "segment between two layers that prune",
}
"""What the letters before a number stand for, in names of functions."""

_PRODUCT = re.compile(
    r"(?:agq\.)?(?P<operation>(?:shift_)?(?:dot|loops)|grid_(?:dot|unpack)|(?:grid_)?panels|floats)\.(?P<instruction_set>[a-z0-9-]+)\.(?P<layout>\w+)"
    r"(?:\.(?P<activations>a4))?(?:\.(?P<form>packed|bytes))?\.m(?P<rows>[1-9]\d*)"
    r"(?:\.of(?P<stored>\d+))?(?:\.ahead(?P<ahead>\d+))?"
)
_LAYOUT = re.compile(r"(?P<sign>[us])(?P<bits>[48])_v(?P<vectors>\d+)x(?P<lanes>\d+)_k(?P<depth>\d+)")
_SIZE = "|".join(SIZES)
_FUNCTION = re.compile(rf"(?P<operation>[a-z]+[0-9]*(?:_[a-z0-9]+)*?)(?P<sizes>(?:_(?:{_SIZE})\d+)+)")


def parse_name(name: str) -> dict:
    """Take a name apart.

    Parameters
    ----------
    name : str
        Of a product in the table of kernels, or of a function in a compiled module.

    Returns
    -------
    dict
        Of a product: operation, instruction_set, layout (a dict: sign, bits, vectors, lanes, depth), rows, and where
        the name says so activations (``"a4"``), form, and what `intrin.tensor_intrin.Tile` calls stored and ahead. Of a
        function: operation, and sizes by their letters.

    Raises
    ------
    AgqError
        If it is neither.
    """
    if product := _PRODUCT.fullmatch(name):
        found = {key: value for key, value in product.groupdict().items() if value}
        if layout := _LAYOUT.fullmatch(found["layout"]):
            parts = {key: value if key == "sign" else int(value) for key, value in layout.groupdict().items()}
            sizes = {key: int(found[key]) for key in ("rows", "stored", "ahead") if key in found}
            return found | {"layout": parts} | sizes
    elif function := _FUNCTION.fullmatch(name):
        sizes = dict(re.findall(rf"_({_SIZE})(\d+)", function["sizes"]))
        return {"operation": function["operation"], "sizes": {key: int(value) for key, value in sizes.items()}}
    raise AgqError(f"{name!r} is not the name of a kernel: docs/kernels.md has the grammar")
