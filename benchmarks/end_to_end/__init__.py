"""Whole models beside those of other engines: prefill of a prompt, decoding, and what rounding costs."""
