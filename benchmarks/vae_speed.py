"""Training steps of VAEs against plain PyTorch with the same networks and fused Adam, and against pythae.

    python -m benchmarks.vae_speed [--filter MLP] [--rounds 15] [--one-thread] [--compiled] [--results FOLDER]

An MLP VAE and a convolutional one (plain PyTorch gets it in the faster memory format) on 28x28 bits, hierarchies of 20
levels, and IWAE with 50 samples, whose memory is measured too: the largest sum of bytes of the tensors of a step.
pythae's column is an epoch of its own trainer against fastflow's step over the same data, shuffled; it needs pythae,
and its rows say so where it is missing.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import contest, run
from benchmarks.cases import Case
from benchmarks.memory import Peak
from benchmarks.neutral_vae import NeutralHierarchicalVAE, NeutralVAE
from fastflow import engine, vae

IMAGE, LATENTS, LEVELS, SAMPLES = (1, 28, 28), 20, 20, 50
EPOCH_BATCHES = 8
GOALS = {"MLP VAE": 1.12, "conv VAE": 1.15, "hierarchical": 1.5, "pythae": 1.3}  # of the median ratios


def bits(n, seed=0):
    """(n, 1, 28, 28) blurred blobs as bits."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 1, 7, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=IMAGE[1:], mode="bilinear")
    return (smooth > 0.55).float()


def mlp_vae(n_samples=None):
    """784-400-20 and back."""
    torch.manual_seed(0)
    if n_samples is None:
        return vae.MLPVAE(IMAGE, LATENTS, (400,))
    return vae.IWAE(IMAGE, LATENTS, n_samples=n_samples, sizes=(400,))


def conv_vae():
    torch.manual_seed(0)
    return vae.ConvVAE(IMAGE, LATENTS)


def hierarchical_vae(hidden=64, latents=16):
    """20 levels, fully connected, residual posteriors."""
    torch.manual_seed(0)
    model = vae.HVAE(IMAGE, (latents,) * LEVELS, hidden, mode="residual")
    with torch.no_grad():  # away from the zeros that the residuals start from
        for parameter in model.levels.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def _step_case(name, construct, neutral, batch, group="vae"):
    def build(device):
        fused, x = construct().to(device), bits(batch).to(device)
        return {"fastflow": contest.fastflow_step(fused, x), "eager": _fastest_layout(neutral, fused, x)}
    return Case(name, group, build, ("fastflow", "eager"))


def _fastest_layout(neutral, fused, x):
    """The neutral model's step in the faster of the two memory formats, where it has convolutions."""
    if not any(isinstance(module, torch.nn.Conv2d) for module in fused.modules()):
        return contest.training_step(neutral(fused), x)

    def step_in(memory_format):
        return lambda: contest.training_step(neutral(fused).to(memory_format=memory_format),
                                             x.contiguous(memory_format=memory_format))
    return contest.best({"contiguous": step_in(torch.contiguous_format), "channels-last": step_in(torch.channels_last)})


def _epoch_case(name, construct, batch):
    """Against pythae's trainer."""
    def build(device):
        model, data = construct().to(device), bits(EPOCH_BATCHES * batch).to(device)
        return {"fastflow": _epoch(model, data, batch), "pythae": _pythae(model, data, batch)}
    return Case(f"{name}, an epoch of {EPOCH_BATCHES} batches of {batch}", "vae", build, ("fastflow", "pythae"))


def _epoch(model, data, batch):
    step = engine.TrainStep(model, contest.fused_adam(model), check_finite=False)

    def call():
        for chosen in torch.randperm(len(data)).split(batch):
            step(data[chosen])
    return call


def _pythae(model, data, batch):
    try:
        from benchmarks.peers import pythae
    except ImportError as missing:
        message = f"{missing} (pip install pythae)"

        def call():
            raise RuntimeError(message)
        return call
    return pythae.epoch(model, data, batch, contest.LEARNING_RATE)


def _hierarchical(hidden, latents, batch):
    name = f"hierarchical VAE of {LEVELS} levels, {hidden} hidden, {latents} latents each, batch {batch}"
    return _step_case(name, lambda: hierarchical_vae(hidden, latents), NeutralHierarchicalVAE, batch)


IWAE_BATCH = 32
CASES = (
    _step_case("MLP VAE 784-400-20, batch 128", mlp_vae, NeutralVAE, 128),
    _step_case("conv VAE 32-64 channels, batch 128", conv_vae, NeutralVAE, 128),
    _hierarchical(64, 16, 64), _hierarchical(128, 16, 32),
    _step_case(f"IWAE 784-400-20 with {SAMPLES} samples, batch {IWAE_BATCH}", lambda: mlp_vae(SAMPLES),
               lambda fused: NeutralVAE(fused, SAMPLES), IWAE_BATCH),
    _epoch_case("MLP VAE 784-400-20", mlp_vae, 128),
    _epoch_case("conv VAE 32-64 channels", conv_vae, 128),
)


def _compiled_hierarchy(hidden=64, latents=16, batch=64):
    """Everybody under torch.compile, and plain PyTorch without it; minutes of compilation."""
    def build(device):
        fused, x = hierarchical_vae(hidden, latents).to(device), bits(batch).to(device)
        compiled = NeutralHierarchicalVAE(fused)
        compiled.forward = torch.compile(compiled.forward, dynamic=False)
        return {"fastflow": contest.fastflow_step(fused, x, compile=True),
                "eager": contest.training_step(NeutralHierarchicalVAE(fused), x),
                "compile": contest.training_step(compiled, x)}
    return Case(f"hierarchical VAE of {LEVELS} levels, {hidden} hidden, batch {batch}, compiled", "vae", build)


def memory_row(device="cpu"):
    """Peak MB of a training step's tensors, parameters and gradients apart, with 50 samples."""
    fused = mlp_vae(SAMPLES).to(device)
    x, peaks = bits(IWAE_BATCH).to(device), {}
    for name, model in (("fastflow", lambda x: fused(x).value), ("eager", NeutralVAE(fused, SAMPLES))):
        parameters = (fused if name == "fastflow" else model).parameters()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with Peak() as seen:
            (-model(x).mean()).backward()
        peaks[name] = round(seen.peak / 2**20, 2)
    row = {"case": f"IWAE 784-400-20 with {SAMPLES} samples, batch {IWAE_BATCH}, peak memory", "peak_mib": peaks,
           "ratio": round(peaks["eager"] / peaks["fastflow"], 3)}
    print(f"{row['case']:<72} {peaks['fastflow']:.1f} MiB  eager {peaks['eager']:.1f} MiB  {row['ratio']:.2f}x less")
    return row


def goals(rows):
    """{case and regime: (ratio, goal)} of the rows that have one."""
    found = {}
    for row in rows:
        goal = next((value for name, value in GOALS.items() if name in row["case"]), None)
        for other, ratio in row["speedup_over"].items():
            wanted = GOALS.get(other, goal)
            if wanted is not None:
                found[f"{row['case']}, {row['clock']}, over {other}"] = (ratio, wanted)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", help="only the cases whose name holds this")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--one-thread", action="store_true", help="leave out all threads in wall time")
    parser.add_argument("--compiled", action="store_true", help="also the hierarchy under torch.compile, minutes more")
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("vae_speed: --device cuda: no GPU is visible to torch", file=sys.stderr)
        return 1
    rows = []
    cases = (*CASES, _compiled_hierarchy()) if args.compiled else CASES
    for case in (case for case in cases if args.filter in case.name):
        for row in run.measure(case, args.device, args.rounds, args.one_thread):
            run.show(row)
            rows.append(row)
    memory = [memory_row(args.device)] if args.filter in "IWAE" else []
    for what, (ratio, goal) in goals(rows).items():
        print(f"{'met   ' if ratio >= goal else 'missed'} {ratio:.2f}, goal {goal:.2f}: {what}")
    if args.results:
        run.save(args.results, f"{args.device}-vae-speed", {"machine": run.machine(args.device), "goals": GOALS,
                                                            "rows": rows, "memory": memory})
    return int(any("fastflow" in row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
