"""Executed instructions of Arm kernels, counted under emulation: the same on every machine."""
