"""Whole models on a GPU: the contests that ``python -m benchmarks.gpu_models`` runs, one file per kind of model.

Every function of a case takes ``(device, tiny)`` and yields rows. ``tiny`` shrinks a case to a rehearsal without a GPU,
in which nothing is captured and nothing compiled by inductor: its times mean nothing, its code is the same.
"""
