"""Scripts that measure and print a table and JSON."""

from agq_tvm.tuning.clock import seconds

__all__ = ["seconds"]
