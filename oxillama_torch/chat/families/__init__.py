"""One file per family of models: how it writes a tool call, how that is read and enforced."""
