"""What calibration found for static activations, and what they clip: `calibration.json` beside the weights."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from agq_tvm.files import write_json

if TYPE_CHECKING:
    from agq_tvm.quantize.trip import StaticRefinement

REPORT = "calibration.json"
_DIGITS = 6


@dataclass
class CalibrationReport:
    """Collects the static quantizer of every linear's input.

    Attributes
    ----------
    linears : dict
        By ``"layers.3.down"``: ``scale``, ``zero``, ``alpha_histogram`` (how many groups have the exponent 0, 1, …;
        None without TRIP), and ``clipped``, the share of every channel's values that no code reaches.
    """

    linears: dict[str, dict] = field(default_factory=dict)

    def add(self, layer: int, role: str, refined: "StaticRefinement") -> None:
        """Take the quantizer of a linear's input, of layer 0, 1, …"""
        scale, zero = refined.quantizer.static
        alpha = refined.quantizer.alpha
        self.linears[f"layers.{layer}.{role}"] = {
            "scale": scale,
            "zero": zero,
            "alpha_histogram": None if alpha is None else alpha.bincount().tolist(),
            "clipped": [round(share, _DIGITS) for share in refined.clipped.tolist()],
        }

    def summary(self) -> dict[str, dict[str, float]]:
        """Return by role the clipped share of all values, ``mean``, and of the channel that loses most, ``largest``."""
        shares: dict[str, list[float]] = {}
        for name, found in self.linears.items():
            shares.setdefault(name.rpartition(".")[2], []).extend(found["clipped"])
        return {role: {"mean": sum(each) / len(each), "largest": max(each)} for role, each in shares.items()}

    def write(self, directory: Path) -> None:
        """Write everything into `REPORT`."""
        write_json(directory / REPORT, {"clipped": self.summary(), "linears": self.linears})
