"""Runs many requests at once over one model: KV cache, batching, the decode loop."""
