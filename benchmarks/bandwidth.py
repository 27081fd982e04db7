"""How close each GPU kernel comes to the speed of memory: forward and backward of the element-wise operations on both
GPU backends, captured in a CUDA graph so that no launch gap counts, against a plain copy in the same run.

A row gives microseconds, the bytes that the operation must move (each operand read once, each result written once,
forward and backward) over that time, and that over the copy's rate. ``python -m benchmarks.bandwidth`` needs a GPU.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

from benchmarks import run, timing
from fastflow import backends, functional

ROUNDS, REPLAYS, CALLS = 7, 3, 4  # a graph holds CALLS calls


def _operand(*shape, dtype):
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_()


def _affine(kind, shape, dtype, passive=None):
    """(call, bytes): forward reads x and params and writes y; backward reads grad_y, x and the raw scales (of a passive
    half nothing, for a shift that comes first the shift too) and writes both gradients."""
    x, params = _operand(*shape, dtype=dtype), _operand(shape[0], 2 * shape[1], *shape[2:], dtype=dtype)
    options = {"scale": kind}
    elements = x.numel()
    if passive:
        params = _operand(*shape, dtype=dtype)
        options |= {"passive": passive, "shift_first": True}
    grads = torch.randn_like(x), torch.randn(shape[0], device="cuda")
    call = lambda: torch.autograd.grad(functional.affine_coupling(x, params, **options), (x, params), grads)  # noqa: E731
    moved = elements * 10 if not passive else elements * 15 // 2
    return call, moved * x.element_size()


def _gaussian(shape, dtype):
    """(call, bytes): params read twice, z and grad_params written, grad_z read; the kernel makes the noise itself."""
    params = _operand(shape[0], 2 * shape[1], *shape[2:], dtype=dtype)
    z = torch.empty(shape, device="cuda", dtype=dtype)
    grads = torch.randn_like(z), torch.randn(shape[0], device="cuda")
    call = lambda: torch.autograd.grad(functional.gaussian_sample_kl(params, seed=7), params, grads)  # noqa: E731
    return call, z.numel() * 8 * z.element_size()


def _spline(shape, bins, dtype):
    """(call, bytes): x and its 3 bins - 1 parameters read twice, y, grad_x, grad_params written, grad_y read."""
    per = 3 * bins - 1
    x, params = _operand(*shape, dtype=dtype), _operand(shape[0], shape[1] * per, dtype=dtype)
    grads = torch.randn_like(x), torch.randn(shape[0], device="cuda")
    call = lambda: torch.autograd.grad(functional.spline(x, params), (x, params), grads)  # noqa: E731
    return call, x.numel() * (5 + 3 * per) * x.element_size()


IMAGES, TOKENS, SMALL = (1024, 48, 16, 16), (64, 1024, 768), (64, 12, 16, 16)
CASES = {
    **{f"affine_coupling {kind} {shape} {dtype}": (lambda k=kind, s=shape, d=dtype: _affine(k, s, d))
       for kind, shape, dtype in (("exp", IMAGES, torch.float32), ("exp", IMAGES, torch.bfloat16),
                                  ("sigmoid", IMAGES, torch.float32), ("tanh", IMAGES, torch.float32),
                                  ("exp", TOKENS, torch.float32), ("tanh", TOKENS, torch.bfloat16),
                                  ("exp", (131072, 64), torch.float32))},
    **{f"affine_coupling in a Glow step {shape}": (lambda s=shape: _affine("sigmoid", s, torch.float32, s[1] // 2))
       for shape in ((1024, 96, 16, 16), SMALL)},
    **{f"gaussian_sample_kl {shape} {dtype}": (lambda s=shape, d=dtype: _gaussian(s, d))
       for shape, dtype in (((65536, 256), torch.float32), ((65536, 256), torch.bfloat16),
                            ((4096, 4, 64, 64), torch.float32))},
    **{f"spline {shape} {bins} bins": (lambda s=shape, b=bins: _spline(s, b, torch.float32))
       for shape, bins in (((65536, 64), 8), ((65536, 64), 16), ((4096, 64), 8))},
}


def copy_rate(size=2**30):
    """Bytes per second of a device-to-device copy, read and written."""
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / min(timing.cuda_seconds(lambda: target.copy_(source), 10) for _ in range(ROUNDS))


def seconds_of(call):
    """Median seconds of one call, without launch gaps."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return statistics.median([timing.cuda_seconds(graph.replay, REPLAYS) for _ in range(ROUNDS + 1)][1:]) / CALLS


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bandwidth", description=__doc__)
    parser.add_argument("--filter", default="", help="only the cases whose name holds this")
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.bandwidth: no GPU is visible to torch", file=sys.stderr)
        return 1
    copied = copy_rate()
    print(f"copy: {copied / 1e12:.2f} TB/s read and written")
    rows = []
    for name, build in CASES.items():
        if args.filter not in name:
            continue
        torch.manual_seed(0)
        call, moved = build()
        for backend in ("triton", "cuda"):
            try:
                with backends.use_backend(backend):
                    seconds = seconds_of(call)
            except Exception as error:
                rows.append({"case": name, "backend": backend, "failed": str(error).splitlines()[0]})
                print(f"{name:<66} {backend:<7} failed: {rows[-1]['failed']}", flush=True)
                continue
            rows.append({"case": name, "backend": backend, "us": round(1e6 * seconds, 2), "bytes": moved,
                         "tb_per_s": round(moved / seconds / 1e12, 3), "of_copy": round(moved / seconds / copied, 3)})
            print(f"{name:<66} {backend:<7} {1e6 * seconds:10.1f} us  {moved / seconds / 1e12:6.2f} TB/s  "
                  f"{moved / seconds / copied:5.2f} of a copy", flush=True)
        del call
    if args.results:
        run.save(args.results, "cuda-bandwidth", {"machine": run.machine("cuda"), "copy_tb_per_s": copied / 1e12,
                                                  "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
