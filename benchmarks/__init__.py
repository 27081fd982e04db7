"""What fusing gains: operations and whole models against eager PyTorch, torch.compile and other people's libraries.

From the repository's root:

    fastflow bench [ops | models | compiled | all]       interleaved medians, JSON for the record
    python -m benchmarks.equal_time                      held-out bits/dim after equal wall time
    python -m benchmarks.peer_launches                   launches and bytes kept for backward, beside the peers
    python -m benchmarks.launches                        the kernel launches of a Glow step, by operator
    python -m benchmarks.page                            docs/benchmarks.md from the records under results/
    python -m pytest benchmarks --benchmark-only         the operations alone, a table per case

None needs a GPU.
"""
