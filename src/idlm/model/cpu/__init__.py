"""The decoder's layers, the sampler head and what they consist of, as C kernels."""
