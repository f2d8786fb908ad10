"""I-DLM inside SGLang, as its speculative algorithm ``IDLM``.

Read in this order: `plugin` (how it comes in), `options` and `requests` (what it takes and what it
refuses), `slots` (what requests carry from forward to forward), `masks` (the mask rows inside the
host's model: `rows`, `product`), `worker` (one step). All that depends on the host's version is in
`host`.
"""
