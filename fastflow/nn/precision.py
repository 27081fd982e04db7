"""Networks of half precision within flows whose z is float32."""

import torch

__all__ = ["taken"]


def taken(x, weight):
    """x as a network of such weights takes it: in their dtype. float64 stays, to be refused beside a lower one."""
    if x.dtype is weight.dtype or torch.float64 in (x.dtype, weight.dtype):
        return x
    return x.to(weight.dtype)
