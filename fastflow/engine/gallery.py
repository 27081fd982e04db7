"""What a trainer draws: grids of samples, reconstructions, rows of a table."""

import torch

from fastflow.engine.evaluate import is_vae, reconstructions, sample_rows, samples
from fastflow.engine.files import write_rows
from fastflow.engine.pictures import save_grid

__all__ = ["draw"]

N_RECONSTRUCTED = 32
COLUMNS = 8


def draw(model, objective, data, settings, folder, step, device):
    """Writes what the model generates as ``folder``/step-NNNNNN.png, or .csv for the rows of a table, and for a VAE
    held-out originals above their reconstructions.

    Args:
        model: a Flow or a VAE, whole in this process.
        objective: as from :func:`fastflow.engine.objectives.objective_for`.
        data: the ImageData or TableData.
        settings: a :class:`~fastflow.engine.settings.Settings`.
        folder: where the files go.
        step: training steps done.
        device: where to compute.

    Returns:
        {"samples": path, "broken_samples": how many are not finite, for a VAE "reconstructions": path}.
    """
    options, name = settings.sample, f"step-{step:06d}"
    if hasattr(data, "columns"):
        rows, n_broken = sample_rows(model, options.count, device, options.temperature)
        return {"samples": str(write_rows(folder / f"{name}.csv", rows, data.columns)), "broken_samples": n_broken}
    n_bins = objective.n_bins
    drawn, n_broken = samples(model, options.count, n_bins, device, options.temperature)
    found = {"samples": str(save_grid(folder / f"{name}.png", drawn, n_bins)), "broken_samples": n_broken}
    if is_vae(model):
        original = data.test[:N_RECONSTRUCTED]
        made = reconstructions(model, objective, original, device).cpu()
        pairs = torch.stack([original.unflatten(0, (-1, COLUMNS)), made.unflatten(0, (-1, COLUMNS))], 1).flatten(0, 2)
        path = save_grid(folder / f"reconstructions-{name}.png", pairs, n_bins, n_columns=COLUMNS)
        found["reconstructions"] = str(path)
    return found
