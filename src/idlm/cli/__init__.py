"""The `idlm` command."""
