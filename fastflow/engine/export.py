"""Trained models as files that leave fastflow: weights with a description, or a function as a graph or compiled.

============ ============= ===================================================================================
format       suffix        what it holds, and what reading it takes
============ ============= ===================================================================================
safetensors  .safetensors  the weights; fastflow and the model's settings, or a model of the same class
torch_export .pt2          a function as a graph of torch.export; torch and the operators that it names
aoti         .pt2          a function compiled by AOTInductor to a native library; the same, on the same platform
============ ============= ===================================================================================

The functions are log_prob of a flow, and elbo, encode and decode of a VAE, with the context of a conditional model as
their last input; elbo takes its noise as an input too, so that it is reproduced to rounding, see
:func:`fastflow.engine.programs.program`. Beside each file stands one of its name and .json: format, versions, function,
inputs, operators, and the SHA-256 of the file.

A graph calls fused operators, ``fastflow_cpu::spline_fwd`` for instance, which must be registered before it is loaded:
:func:`load_exported` does that, and elsewhere ``fastflow.extension.load("cpu")``. ``backend="reference"`` makes one
that needs torch alone. Load .pt2 files from sources that you trust, as you would run a program: one made with aoti is
native code. .safetensors files run nothing.
"""

import contextlib
import hashlib
import io
import json
import math
import sys
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from fastflow import backends, extension
from fastflow.diagnostics.mode import in_eval
from fastflow.engine.errors import RunError
from fastflow.engine.files import whole, write_text
from fastflow.engine.programs import default_function, program

__all__ = ["FORMATS", "export", "load_exported"]

FORMATS = {"safetensors": ".safetensors", "torch_export": ".pt2", "aoti": ".pt2"}
VERSION = 1
MAX_DESCRIPTION_BYTES = 1 << 24


def export(model, path, format="safetensors", *, function=None, n_samples=1, example=None, context=None, backend=None,
           settings=None):
    """Writes the model to ``path``, whole or not at all, and its description beside it.

    Args:
        model: a module; for "torch_export" and "aoti" a Flow or a VAE. It is exported in eval mode.
        path: with the suffix of the format, which takes the place of another format's and follows any other name.
        format: a key of ``FORMATS``.
        function: of those formats, "log_prob", "elbo", "encode" or "decode", see programs.program; None: log_prob of a
            flow, elbo of a VAE.
        n_samples: K draws of the latents for each x, fixed in an exported elbo.
        example: (B, *event), B >= 2, data of the shape, dtype and device that the function is to take, with any number
            of examples; None draws two from the model. "safetensors" needs none.
        context: (2, ...) of a conditional model, an example of the input that the function then takes last; None for
            labels, or for a model without.
        backend: whose operators the graph is to call, "reference" for torch's own alone; None for the usual choice.
        settings: {section: {key: value}} of the run, kept in the description, with which :func:`load_exported` builds
            the model.

    Returns:
        The path.

    Raises:
        ValueError: an unknown format, or a function that the model does not have.
        RunError: the file can't be written, or the model can't be exported; the message says why.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    path = Path(path)
    stem = path.stem if path.suffix in FORMATS.values() else path.name
    path = path.with_name(stem + FORMATS[format])
    about = {"fastflow_export": VERSION, "format": format, "torch": torch.__version__,
             "model": type(model).__name__, "settings": settings}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            if format == "safetensors":
                about["tensors"] = _write_weights(model, temporary)
            else:
                about |= _write_program(model, temporary, format, function, n_samples, example, context, backend)
            about["sha256"] = _sha256(temporary)
        write_text(_beside(path), json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"{path}: could not be written ({error.strerror or error})") from error
    return path


def load_exported(path, model=None):
    """What :func:`export` wrote: a model with its weights, or the function, without gradients, of the tensors that
    programs.program lists.

    Args:
        path: the exported file.
        model: for .safetensors, whose weights are to be set; None builds it from the settings in the description.

    Raises:
        RunError: the file is damaged, of a newer format or of another model, or an operator it needs is not there.
    """
    path = Path(path)
    beside = _beside(path)
    if not beside.exists() and path.with_suffix(".json").exists():
        beside = path.with_suffix(".json")  # as earlier versions named it, alike for all formats
    about = _description(beside)
    if _sha256(path) != about.get("sha256"):
        raise RunError(f"{path}: corrupt, its SHA-256 is not that of {beside.name}")
    if about["format"] == "safetensors":
        return _read_weights(path, about, model)
    for name in about.get("backends", ()):
        try:
            extension.load(name)
        except (RuntimeError, KeyError) as error:
            raise RunError(f"{path}: needs the operators of fastflow's backend {name!r} ({error})") from error
    if about["format"] == "torch_export":
        loaded = torch.export.load(path).module()
    else:
        loaded = torch._inductor.aoti_load_package(str(path))

    @torch.no_grad()  # a graph holds the operators of the forward direction, which have no gradients of their own
    def function(*inputs):
        return loaded(*inputs)

    return function


def _write_weights(model, path):
    """{name: {"shape", "dtype", "memory_format"}} of the tensors written; contiguous ones, whatever they were."""
    from safetensors.torch import save

    tensors, about = {}, {}
    for name, tensor in model.state_dict().items():
        tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        about[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."),
                       "memory_format": "channels_last" if _channels_last(tensor) else "contiguous"}
    path.write_bytes(save(tensors))  # save_file has errors of its own for a full disk, and keeps the file from others
    return about


def _channels_last(tensor):
    return (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
            and not tensor.is_contiguous())


def _read_weights(path, about, model):
    from safetensors.torch import load_file

    if model is None:
        if not isinstance(about.get("settings"), dict):
            raise RunError(f"{path}: has no settings to build the model from; give one")
        from fastflow.engine.models import build_model
        from fastflow.engine.settings import from_dict

        model = build_model(from_dict(about["settings"]))
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise RunError(f"{path}: is of another model ({' '.join(str(error).split())[:200]})") from error
    kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, entry in about.get("tensors", {}).items():
        if entry.get("memory_format") == "channels_last" and name in kept:
            kept[name].data = kept[name].data.contiguous(memory_format=torch.channels_last)
    return model


def _write_program(model, path, format, function, n_samples, example, context, backend):
    """Traces the function with any batch size and writes it; what the description says about it."""
    try:
        with (in_eval(model), torch.no_grad(),
              contextlib.nullcontext() if backend is None else backends.use_backend(backend)):
            function = default_function(model) if function is None else function
            module, inputs = program(model, function, n_samples, example, context)
            batch, dims = torch.export.Dim("batch"), [int(name == "noise") for name in inputs]  # noise is (K, B, ...)
            shapes = tuple(tree_map(lambda _, dim=dim: {dim: batch}, value)
                           for dim, value in zip(dims, inputs.values(), strict=True))
            exported = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=shapes)
            package = io.BytesIO()  # torch's writer of files ends the process where a disk is full
            if format == "torch_export":
                torch.export.save(exported, package)
            else:
                _without_infinities(exported.graph)
                torch._inductor.aoti_compile_and_package(exported, package_path=package)
            path.write_bytes(package.getbuffer())
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.UserError, RuntimeError) as error:
        raise RunError(f"{function} of {type(model).__name__} can't be exported to {format}: "
                       f"{' '.join(str(error).split())[:300]}") from error
    operators = sorted({str(node.target).removesuffix(".default") for node in exported.graph.nodes
                        if node.op == "call_function" and str(node.target).startswith("fastflow_")})
    described = [tree_map(lambda t, dim=dim: _about(t, dim), value)
                 for dim, value in zip(dims, inputs.values(), strict=True)]
    return {"function": function, "inputs": described, "operators": operators,
            "backends": sorted({name.partition(".")[0].removeprefix("fastflow_") for name in operators})}


def _about(tensor, batch_dim):
    """{"shape", "dtype", "device"}; "B" stands for the batch."""
    shape = ["B" if dim == batch_dim else size for dim, size in enumerate(tensor.shape)]
    return {"shape": shape, "dtype": str(tensor.dtype).removeprefix("torch."), "device": tensor.device.type}


def _without_infinities(graph):
    """Operators' infinite arguments become the largest double, which is infinite in float32: AOTInductor's loader can't
    read infinities."""
    def finite(value):
        return math.copysign(sys.float_info.max, value) if isinstance(value, float) and math.isinf(value) else value

    for node in graph.nodes:
        if str(node.target).startswith("fastflow_"):
            node.args = torch.fx.node.map_aggregate(node.args, finite)


def _beside(path):
    """The path of the description of the exported file ``path``."""
    return path.with_name(f"{path.name}.json")


def _description(beside):
    try:
        if beside.stat().st_size > MAX_DESCRIPTION_BYTES:
            raise RunError(f"{beside}: larger than {MAX_DESCRIPTION_BYTES} bytes")
        about = json.loads(beside.read_text("utf-8"))
    except OSError as error:
        raise RunError(f"{beside}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{beside}: is not JSON ({error})") from error
    if not isinstance(about, dict) or about.get("format") not in FORMATS:
        raise RunError(f"{beside}: does not describe an exported model")
    if about.get("fastflow_export") != VERSION:
        raise RunError(f"{beside}: format {about.get('fastflow_export')!r}, this version of fastflow reads {VERSION}")
    return about


def _sha256(path):
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()
