"""Whether a kernel may stand in for calls of a module."""

__all__ = ["is_hooked"]


def is_hooked(module):
    """Whether a call of the module would run more than its class's forward, or an inverse that is not its class's."""
    own = module.__dict__
    return (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
            or "forward" in own or "inverse" in own)
