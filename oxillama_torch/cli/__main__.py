"""``python -m oxillama_torch.cli``: the command where its script is not on PATH."""

from oxillama_torch.cli.main import main

main()
