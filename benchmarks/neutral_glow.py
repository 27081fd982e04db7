"""Glow in plain, careful eager PyTorch: the neutral baseline, written as a good user would without fastflow.

The model of ``fastflow.flows.Glow`` and its parameter names are kept apart on purpose; :func:`copy_weights` carries the
weights over, so that both compute the same likelihood.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
