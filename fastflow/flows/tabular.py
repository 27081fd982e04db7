"""The tabular density benchmarks of Papamakarios et al. 2017: what their features and the networks for them number."""

__all__ = ["FEATURES", "masked_configs"]

FEATURES = {"power": 6, "gas": 8, "hepmass": 21, "miniboone": 43, "bsds300": 63}


def masked_configs():
    """{name: keyword arguments} of the 5- and 10-layer flows of "Masked autoregressive flow for density estimation"
    (arXiv:1705.07057), of RealNVP and MAF alike: "power-5", "power-10" and so on, and the same for MNIST."""
    sizes = {**{name: (features, 100 if features < 10 else 512) for name, features in FEATURES.items()},
             "mnist": (784, 1024)}
    return {f"{name}-{n_layers}": {"features": features, "n_layers": n_layers, "hidden": (width, width)}
            for name, (features, width) in sizes.items() for n_layers in (5, 10)}
