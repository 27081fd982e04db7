"""The launches that Triton's kernels declare are those that happen."""

import cases
import pytest
import torch
from launch_cases import LAUNCH_CASES

from fastflow.launches import count

ROWS = [row for row in LAUNCH_CASES if row[1] is not None]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].op}-{row[0]}")
def test_launches_are_those_declared(row, launches, triton):
    case, forward, backward, *_ = row
    tensors = case.tensors(torch.float32)
    cotangents = cases.cotangents_of(case, tensors)
    launches.clear()
    with count("triton") as counted:
        cases.evaluate(case, tensors, cotangents=cotangents)
    assert counted.total == len(launches) == forward + backward
