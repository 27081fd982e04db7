"""A model in eval mode for a while."""

import contextlib

__all__ = ["in_eval"]


@contextlib.contextmanager
def in_eval(model):
    """Inside, the model is in eval mode; afterwards each of its modules is in the mode that it was in, those that stay
    in eval mode while the rest trains among them."""
    training, modes = model.training, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for module, mode in modes:
            module.training = mode
