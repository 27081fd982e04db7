"""A training step of the hierarchical VAE of 20 levels of benchmarks.vae_speed, as it is and as a CUDA graph."""

from benchmarks import contest, vae_speed
from benchmarks.gpu import measuring
from benchmarks.neutral_vae import NeutralHierarchicalVAE


def hierarchy(device, tiny):
    hidden, latents, batch = (8, 4, 4) if tiny else (64, 16, 64)
    x = vae_speed.bits(batch).to(device)

    def own():
        return vae_speed.hierarchical_vae(hidden, latents).to(device)
    variants = {"fastflow": lambda: measuring.fastflow_step(own(), x, device),
                "fastflow, captured": lambda: measuring.fastflow_step(own(), x, device, capture=True),
                "eager": lambda: contest.training_step(NeutralHierarchicalVAE(own()), x),
                "eager, captured": lambda: measuring.captured_training_step(NeutralHierarchicalVAE(own()), x, device)}
    yield measuring.measure(measuring.Contest(
        f"training step of a hierarchical VAE of {vae_speed.LEVELS} levels, {hidden} hidden, {latents} latents each, "
        f"batch {batch}", "vae", variants, batch, goals={("fastflow, captured", "eager"): 5.0}), device)
