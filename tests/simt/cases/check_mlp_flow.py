"""What only the emulation can check of mlp_flow: both sizes of tiles, weights in pieces, little shared memory."""

import pytest
import torch
from cases import check_together, cotangents_of, evaluate, flow_case
from tolerances import assert_bitwise

TILE_OF_32 = 2049  # csrc/cuda/mlp_flow.cuh, kSmallBatch: the least batch with tiles of 32 samples
SIZES = ((2, (64, 64), None), (10, (33,), 2), (5, (6, 70), None), (7, (), None))


def grow(case, tensors, batch):
    """The operands with their samples repeated up to this batch."""
    times = -(-batch // tensors["x"].shape[0])
    return {n: t.repeat(times, 1)[:batch] if n in ("x", "context") else t for n, t in tensors.items()}


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_sample_has_the_same_bits_in_every_tile(sizes, activation, emulator):
    features, hidden, context = sizes
    case = flow_case("tiles", features, hidden, 2, batch=37, context=context, scale="tanh", activation=activation)
    few = {n: t if n in ("x", "context") else 0.5 * t for n, t in case.tensors(torch.float32).items()}
    many = grow(case, few, TILE_OF_32)
    of_few = cotangents_of(case, few)
    of_many = {n: t.repeat(-(-TILE_OF_32 // 37), *[1] * (t.dim() - 1))[:TILE_OF_32] for n, t in of_few.items()}
    got = [evaluate(case, tensors, cotangents=c) for tensors, c in ((few, of_few), (many, of_many))]
    for part, names in ((0, ("z", "logdet")), (1, ("x", "context")[:1 + (context is not None)])):
        for name in names:
            for begin in (0, 37 * 20):
                assert_bitwise(got[1][part][name][begin:begin + 37], got[0][part][name], f"{sizes} {activation} {name}")


def test_gradients_in_tiles_of_32(emulator):
    """A flow of a batch that fills no tile."""
    for activation in ("relu", "silu"):
        case = flow_case(f"many {activation}", 4, (36,), 1, batch=TILE_OF_32 + 20, context=1, scale="tanh",
                         activation=activation)
        check_together(case, torch.float32)


@pytest.mark.parametrize("limit", [227, 99, 64], ids=lambda kilobytes: f"{kilobytes} KB")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_in_pieces(limit, dtype, emulator):
    emulator.simt_set_shared_limit(limit * 1024)
    case = flow_case("pieces", 12, (128, 100), 1, batch=19, scale="tanh", activation="relu")
    if dtype == torch.float64 and limit == 64:
        with pytest.raises(RuntimeError, match="mlp_flow: the widths need .* bytes of shared memory"):
            check_together(case, dtype, size=0.1)
    else:
        check_together(case, dtype, size=0.1)
