"""Introspective Strided Decoding (arXiv 2604.11035), as functions on tensors.

Read in this order: `layout` (which rows one forward holds), `sampling` (logits to a
distribution), `verify` (which drafts stand), `propose` (the next drafts), `cycle` (one forward,
put together).
"""
