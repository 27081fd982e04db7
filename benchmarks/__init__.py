"""What fusing gains: every operation and the Glow step against eager PyTorch, torch.compile and what Glow code runs today.

Run by ``fastflow bench`` from the repository's root, or ``pytest benchmarks``.
"""
