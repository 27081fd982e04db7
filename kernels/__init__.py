"""Triton kernels and their launchers, one file per op stem. Imports torch and triton only."""
