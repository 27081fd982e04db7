"""Argument checks shared by the public functions: errors that name the argument, what came and what was expected."""

import numbers

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name, value, floating=True):
    """``value`` is a strided tensor, of a floating dtype unless ``floating`` is false."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if floating and value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a dtype among float16, bfloat16, float32, float64, got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got layout {value.layout}")


def choice(name, value, options):
    """``value`` is one of ``options``."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")


def count(name, value, least=0):
    """``value`` as an int of at least ``least`` that fits 64 bits; numpy's integers are among them."""
    if not isinstance(value, (int, torch.SymInt)) and isinstance(value, numbers.Integral):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name}: expected an int below 2^63, got {value}")
    return value


def counts(name, values, least=0):
    """``values`` as a tuple of ints, each as of :func:`count`."""
    if isinstance(values, (str, torch.Tensor)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name}: expected a sequence of ints, got {type(values).__name__}")
    return tuple(count(name, value, least) for value in values)


def extent(name, value, least=1):
    """``value``, an int or a sequence of them, each of at least ``least``, as a torch.Size."""
    return torch.Size([count(name, value, least)] if isinstance(value, numbers.Integral) else
                      counts(name, value, least))


def number(name, value):
    """``value`` is a real number."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def shape(name, value, expected):
    """``value`` has exactly the shape ``expected``."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(value.shape)}")


def events(name, value, event_shape):
    """``value`` is a batch (B, *event_shape)."""
    if value.dim() == 0 or tuple(value.shape[1:]) != tuple(event_shape):
        expected = (value.shape[0] if value.dim() else "B", *event_shape)
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")


def same_device(name, value, reference_name, like):
    """``value`` is on ``like``'s device."""
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} like {reference_name}, got {value.device}")


def noise(eps, seed, generator, name, like, batch=None):
    """At most one of ``eps`` and ``seed`` is given; the seed is an int, be it numpy's, of 64 bits, signed or not, or an
    int64 tensor on the device of ``like``, the operand ``name``: 0-d, or (batch,) too where there is a ``batch``."""
    if eps is not None and seed is not None:
        raise ValueError("eps and seed: expected at most one of them, got both")
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected an int or an int64 tensor, got {seed.dtype}")
        if seed.dim() != 0 and (batch is None or tuple(seed.shape) != (batch,)):
            raise ValueError(f"seed: expected shape (){'' if batch is None else f' or ({batch},)'}, got "
                             f"{tuple(seed.shape)}")
        same_device("seed", seed, name, like)
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
        raise TypeError(f"seed: expected an int or an int64 tensor, got {type(seed).__name__}")
    elif seed is not None and not -2**63 <= seed < 2**64:
        raise ValueError(f"seed: expected an int of 64 bits, -2^63 to 2^64 - 1, got {seed}")
    rng(generator)


def rng(generator):
    """``generator`` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")


def no_mixed_double(named):
    """float64 operands are not mixed with lower dtypes; ``named`` is [(name, tensor or None)]."""
    double = other = None
    for name, t in named:
        if t is not None:
            if t.dtype is torch.float64:
                double = double or name
            elif other is None:
                other = name, t.dtype
    if double is not None and other is not None:
        raise TypeError(f"{other[0]}: expected float64 like {double} (float64 is not mixed with a lower dtype), "
                        f"got {other[1]}")


def goes_with(name, t, of, parameter):
    """A floating ``t`` is float64 if a module's ``parameter``, called ``of``, is, and else it is not."""
    if t.is_floating_point() and (t.dtype is torch.float64) is not (parameter.dtype is torch.float64):
        raise TypeError(f"{name}: expected {parameter.dtype} like {of} (float64 is not mixed with a lower dtype), got "
                        f"{t.dtype}")


def with_running_logdet(named, logdet, x):
    """``logdet`` is None or (B,) beside x (B, ...), and neither it nor the operands of ``named`` mix float64 with a
    lower dtype; a float32 one goes with half-precision operands. Returns it, in float32 at least."""
    if logdet is None:
        no_mixed_double(named)
        return None
    tensor("logdet", logdet)
    shape("logdet", logdet, (x.shape[0],))
    same_device("logdet", logdet, "x", x)
    mixed = (x.dtype == torch.float64) != (logdet.dtype == torch.float64)
    no_mixed_double([*named, ("logdet", logdet)] if mixed else named)
    return logdet.float() if logdet.dtype in (torch.float16, torch.bfloat16) else logdet
