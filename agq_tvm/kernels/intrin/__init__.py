"""Tensor intrinsics, one file for each instruction set: layouts, dot products and what they need."""
