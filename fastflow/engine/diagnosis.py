"""A VAE's diagnosis as pictures and text."""

import math
from pathlib import Path

from fastflow.engine.files import write_text
from fastflow.engine.objectives import levels_of
from fastflow.engine.pictures import save_grid

__all__ = ["write_diagnosis"]

WIDTH, HEIGHT, MARGIN = 640, 360, 56
INK, BAR, FAINT, ACCENT = (32, 32, 32), (60, 110, 180), (205, 205, 205), (200, 70, 50)


def write_diagnosis(folder, diagnosis, model, n_bins):
    """Writes diagnosis.txt, rate-distortion.png and, where the latents were measured, latent-kl.png and
    traversal.png (images of 1 or 3 channels only); needs Pillow.

    Args:
        folder: made if missing.
        diagnosis: a diagnostics.Diagnosis.
        model, n_bins: the VAE, and the number of levels of its images, for the traversal.

    Returns:
        {name: path} of the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"summary": folder / "diagnosis.txt"}
    write_text(paths["summary"], diagnosis.summary() + "\n")
    paths["rate_distortion"] = _rate_distortion(folder / "rate-distortion.png", diagnosis)
    if diagnosis.kl is not None:
        paths["latent_kl"] = _latent_kl(folder / "latent-kl.png", diagnosis)
    traversal = diagnosis.traversal
    if traversal is not None and traversal.images.dim() == 5 and traversal.images.shape[2] in (1, 3):
        images = levels_of(model, traversal.images.flatten(0, 1), n_bins)
        paths["traversal"] = save_grid(folder / "traversal.png", images, n_bins, n_columns=len(traversal.values))
    return paths


def _canvas(title):
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 12), title, fill=INK)
    draw.line([(MARGIN, 36), (MARGIN, HEIGHT - MARGIN), (WIDTH - 16, HEIGHT - MARGIN)], fill=INK)
    return image, draw


def _latent_kl(path, diagnosis):
    """A bar for each latent, the largest KL first, those of inactive units grey."""
    order = diagnosis.kl.argsort(descending=True).tolist()
    top = max(diagnosis.kl.max().item(), 1e-12)
    top = top if math.isfinite(top) else 1.0
    image, draw = _canvas(f"mean KL of each latent, nats; active units {int(diagnosis.active.sum())} of {len(order)}")
    width = (WIDTH - 24 - MARGIN) / len(order)
    for place, index in enumerate(order):
        value = diagnosis.kl[index].item()
        share = min(max(value / top, 0.0), 1.0) if math.isfinite(value) else 1.0
        left = MARGIN + 4 + place * width
        base = HEIGHT - MARGIN
        draw.rectangle([left, base - share * (base - 44), left + max(0.8 * width, 1.0) - 1, base],
                       fill=BAR if diagnosis.active[index] else FAINT)
        if width >= 18:
            draw.text((left, base + 6), str(index), fill=INK)
    draw.text((6, 38), f"{top:.3g}", fill=INK)
    draw.text((6, HEIGHT - MARGIN - 6), "0", fill=INK)
    image.save(path, format="PNG")
    return path


def _rate_distortion(path, diagnosis):
    """The model's point between rate 0 and -ELBO, and the line of models of the same ELBO through it."""
    point = diagnosis.point
    rate, distortion = point.rate, point.distortion
    image, draw = _canvas(f"rate {rate:.4g}, distortion {distortion:.4g} nats; grey: the same ELBO {point.elbo:.4g}")
    draw.text((6, 38), "distortion", fill=INK)
    draw.text((WIDTH - 60, HEIGHT - MARGIN + 22), "rate", fill=INK)
    if not (math.isfinite(rate) and math.isfinite(distortion)):
        draw.text((MARGIN + 40, HEIGHT // 2), "not finite", fill=ACCENT)
    else:
        right = max(2.0 * rate, 1e-6)
        low, high = distortion - right, distortion + right

        def place(x, y):
            return (MARGIN + x / right * (WIDTH - 24 - MARGIN),
                    HEIGHT - MARGIN - (y - low) / (high - low) * (HEIGHT - MARGIN - 44))

        draw.line([place(0.0, distortion + rate), place(right, distortion + rate - right)], fill=FAINT, width=2)
        x, y = place(rate, distortion)
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=ACCENT)
        for value, where in ((0.0, place(0.0, low)), (right, place(right, low))):
            draw.text((where[0] - 8, where[1] + 6), f"{value:.3g}", fill=INK)
        draw.text((6, 54), f"{high:.4g}", fill=INK)
        draw.text((6, HEIGHT - MARGIN - 6), f"{low:.4g}", fill=INK)
    image.save(path, format="PNG")
    return path
