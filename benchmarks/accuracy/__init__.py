"""What quantization costs in perplexity: every way to quantize, on every model, paired on the same tokens."""
