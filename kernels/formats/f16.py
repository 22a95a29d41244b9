"""F16: one weight per block, IEEE 754 binary16, little-endian."""

import torch

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.plain import plain_format

FORMAT = plain_format(GGMLType.F16, torch.float16)
