"""What fusing gains: every operation and the Glow step against eager PyTorch, torch.compile and today's Glow code.

From the repository's root: ``fastflow bench`` (interleaved, JSON for the record), or the operations alone, a table per
case, by ``python -m pytest benchmarks --benchmark-only``. ``python -m benchmarks.launches`` counts the kernel launches
of a Glow training step, without a GPU.
"""
