"""4-bit LLMs on the edge, compiled: Agile-Quant as an Apache TVM flow."""

__version__ = "0.1.0"
