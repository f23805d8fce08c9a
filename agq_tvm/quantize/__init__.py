"""Numbers: quantizers, calibration, the quantized checkpoint and the reference that defines its meaning."""
