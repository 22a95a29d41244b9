"""y = x @ dequantize(W)^T (+ bias) on packed weights."""
