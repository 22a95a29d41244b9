"""GGUF files: types, reader, metadata, writer."""

from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.gguf.reader import GGUFFile, TensorInfo, read_gguf
from oxillama_torch.gguf.types import GGMLType

__all__ = ["GGMLType", "GGUFFile", "Metadata", "TensorInfo", "read_gguf"]
