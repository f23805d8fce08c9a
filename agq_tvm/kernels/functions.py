"""Functions of a module that is being made: each kernel is built and added once, however many layers call it."""

from collections.abc import Callable


class Functions:
    """The PrimFuncs that were added.

    Parameters
    ----------
    builder : relax.BlockBuilder
    """

    def __init__(self, builder):
        self._builder, self._known = builder, {}

    def add(self, build: Callable, *arguments):
        """Return the GlobalVar of ``build(*arguments)``, which is called once for the same arguments."""
        key = (build, *arguments)
        if key not in self._known:
            func = build(*arguments)
            self._known[key] = self._builder.add_func(func, str(func.attrs["global_symbol"]))
        return self._known[key]
