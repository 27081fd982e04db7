"""What fusing gains: operations and whole models against eager PyTorch, torch.compile and other people's libraries.

From the repository's root; each module's docstring says more:

    fastflow bench [ops | models | compiled | all]       interleaved medians, JSON for the record
    python -m benchmarks.equal_time                      held-out bits/dim after equal wall time
    python -m benchmarks.equal_steps                     the same after equally many steps
    python -m benchmarks.vae_speed                       training steps of VAEs, beside pythae's too
    python -m benchmarks.adapters                        models of other libraries, before and after accelerate
    python -m benchmarks.library_suites                  other libraries' own tests on fused layers
    python -m benchmarks.memory                          what the memory modes save and cost
    python -m benchmarks.launches                        the kernel launches of a Glow step, by operator
    python -m benchmarks.step_launches                   all launches of the step, by class of work
    python -m benchmarks.peer_launches                   launches and bytes kept for backward, beside the peers
    python -m benchmarks.trainer_overhead                what the trainer's loop costs beside the step
    python -m benchmarks.recipes                         what the recipes of VAEs reach
    python -m benchmarks.toy2d                           KL to two-dimensional densities known exactly
    python -m benchmarks.self_consuming                  models trained on their own samples
    python -m benchmarks.gpu_models                      whole models on a GPU
    python -m benchmarks.bandwidth                       GPU kernels against the speed of memory
    python -m benchmarks.page                            docs/benchmarks.md from the records under results/
    python -m benchmarks.inversion                       docs/inversion.md
    python -m benchmarks.scaling                         the table of docs/scaling.md
    python -m pytest benchmarks --benchmark-only         the operations alone, a table per case

gpu_models and bandwidth need a GPU; nothing else does.
"""
