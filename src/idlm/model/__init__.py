"""Decoder, adapter, checkpoints and tokenizer, and kernels for each kind of device."""
