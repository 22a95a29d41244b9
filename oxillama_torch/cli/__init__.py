"""The oxillama command: one file per subcommand."""
