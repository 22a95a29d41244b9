"""F32: one weight per block, IEEE 754 binary32, little-endian."""

import torch

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.plain import plain_format

FORMAT = plain_format(GGMLType.F32, torch.float32)
