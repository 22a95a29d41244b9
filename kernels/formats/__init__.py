"""GGML formats: one file per type; ``base`` says what a format is."""

from oxillama_torch.kernels.formats.base import Format, PackedTensor, dequantize, get, known

__all__ = ["Format", "PackedTensor", "dequantize", "get", "known"]
