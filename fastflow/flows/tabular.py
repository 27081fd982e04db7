"""What flows of tables share: halves that take turns, and the sizes of the benchmarks of Papamakarios et al. 2017."""

from fastflow import checks

__all__ = ["FEATURES", "halves", "masked_configs"]

FEATURES = {"power": 6, "gas": 8, "hepmass": 21, "miniboone": 43, "bsds300": 63}


def masked_configs():
    """{name: keyword arguments} of the 5- and 10-layer flows of "Masked autoregressive flow for density estimation"
    (arXiv:1705.07057), of RealNVP and MAF alike: "power-5", "power-10" and so on, and the same for MNIST."""
    sizes = {**{name: (features, 100 if features < 10 else 512) for name, features in FEATURES.items()},
             "mnist": (784, 1024)}
    return {f"{name}-{n_layers}": {"features": features, "n_layers": n_layers, "hidden": (width, width)}
            for name, (features, width) in sizes.items() for n_layers in (5, 10)}


def halves(features, n_layers, alternate=True):
    """[(passive, active, flip)] of couplings that take turns on the two halves of the features unless ``alternate`` is
    false: how many features pass and how many are transformed, and whether the active ones come first. A single
    feature is active in every coupling."""
    checks.count("features", features, 1)
    checks.count("n_layers", n_layers)
    first = features // 2
    return [(features - first, first, True) if alternate and index % 2 == 1 and features > 1 else
            (first, features - first, False) for index in range(n_layers)]
