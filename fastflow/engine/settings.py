"""Recipes: TOML files that become typed settings. An unknown key or a wrong type is an error that names the field."""

import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastflow.data import DATASETS
from fastflow.engine.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Settings", "differences", "from_dict", "load_settings", "recipes"]

MAX_RECIPE_BYTES = 1 << 20
# What may change between a run and its continuation: how long it goes on and what it reports, never what it computes.
MAY_CHANGE = ("description", "sample", "train.steps", "train.max_seconds", "train.device", "train.log_every",
              "train.eval_every", "train.collapse_every", "train.checkpoint_every", "train.keep_checkpoints",
              "train.strategy", "train.process_timeout", "train.skip_non_finite")

Positive = Annotated[int, Field(ge=1, le=2**31)]
Count = Annotated[int, Field(ge=0, le=2**31)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataSettings(Section):
    name: Literal[tuple(DATASETS)] = Field(description="which images")


class GlowSettings(Section):
    kind: Literal["glow"]
    n_levels: Positive = Field(3, description="scales; each halves height and width")
    n_steps: Positive = Field(8, description="flow steps per level: actnorm, 1x1 convolution, affine coupling")
    hidden_channels: Positive = Field(64, description="width of each coupling's network")
    scale: Literal["exp", "sigmoid", "tanh", "atan", "softplus", "rational"] = Field(
        "tanh", description="map from the network's output to the scale; the clamped ones keep sampling stable")


class VAESettings(Section):
    kind: Literal["vae"]
    network: Literal["mlp", "conv"] = Field("mlp", description="networks of encoder and decoder")
    latent_features: Positive = Field(16, description="dimensions of z")
    hidden_features: Positive = Field(256, description="width of encoder and decoder, of mlp networks")
    beta: float = Field(1.0, ge=0, description="weight of the rate in the training loss")
    n_samples: Positive = Field(1, description="draws of z per image")


class IWAESettings(Section):
    kind: Literal["iwae"]
    network: Literal["mlp", "conv"] = Field("mlp", description="networks of encoder and decoder")
    latent_features: Positive = Field(16, description="dimensions of z")
    n_importance: int = Field(10, ge=1, le=5000, description="importance samples per image, K of the bound trained")


class VQVAESettings(Section):
    kind: Literal["vqvae"]
    n_codes: int = Field(64, ge=2, le=2**20, description="vectors of the codebook")
    features: Positive = Field(8, description="dimensions of each code's vector")
    channels: tuple[Positive, ...] = Field((32,), strict=False, min_length=1,
                                           description="of the convolutions; each halves height and width")


class DiscreteVAESettings(Section):
    kind: Literal["discrete_vae"]
    latent_bits: Positive = Field(32, description="independent bits of z")
    hidden_features: Positive = Field(256, description="width of encoder and decoder")
    estimator: Literal["disarm", "rloo", "vimco", "reinforce"] = Field(
        "disarm", description="gradient estimator of the bits")
    n_samples: Positive = Field(4, description="samples of z per image, as the estimator takes them")
    beta: float = Field(1.0, ge=0, description="weight of the rate in the training loss")


class VDVAESettings(Section):
    kind: Literal["vdvae"]
    groups: tuple[Positive, ...] = Field((2, 2), strict=False, min_length=1,
                                         description="latent groups at each resolution, coarsest first")
    channels: Positive = Field(32, description="of the states")
    latent_channels: Positive = Field(8, description="of each group")
    beta: float = Field(1.0, ge=0, description="weight of the rate in the training loss")


class TrainSettings(Section):
    steps: Count = Field(description="training steps in all; may grow on resume")
    max_seconds: float = Field(0.0, ge=0, description="stop, save and evaluate after this long; 0 for no limit")
    batch_size: Positive = Field(32, description="images per step")
    learning_rate: float = Field(1e-3, gt=0, description="of Adam")
    warmup_steps: Count = Field(0, description="steps over which the learning rate rises linearly")
    kl_warmup_steps: Count = Field(0, description="steps over which a VAE's weight of the rate rises linearly from 0")
    clip_grad_norm: float = Field(0.0, ge=0, description="scale larger gradients down to this norm; 0 for never")
    accumulate: Positive = Field(1, description="parts that a batch is cut into to save memory")
    strategy: Literal["auto", "ddp", "fsdp"] = Field("auto", description="whole models or shards; auto is ddp")
    process_timeout: float = Field(60.0, gt=0, description="seconds that a process waits for another before it fails")
    skip_non_finite: Count = Field(0, description="steps that are not finite that may be left out")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="average of the weights, to evaluate and sample; 0 for none")
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order and noise")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is cuda where torch sees a GPU")
    threads: Count = Field(0, description="CPU threads; 0 leaves torch's choice, 1 is fastest for very small models")
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    eval_every: Count = Field(0, description="steps between evaluations on held-out images; 0 for the end only")
    collapse_every: Count = Field(100, description="steps between looks for collapsed latents of a VAE; 0 for none")
    checkpoint_every: Count = Field(0, description="steps between checkpoints; 0 for the end only")
    keep_checkpoints: Count = Field(3, description="how many to keep; 0 for all")


class SampleSettings(Section):
    count: int = Field(64, ge=1, le=4096, description="images in the grid")
    temperature: float = Field(1.0, gt=0, description="standard deviation of the base distribution when sampling")


class Settings(Section):
    """Everything that defines a run."""

    description: str = ""
    data: DataSettings
    model: Annotated[GlowSettings | VAESettings | IWAESettings | VQVAESettings | DiscreteVAESettings | VDVAESettings,
                     Field(discriminator="kind")]
    train: TrainSettings
    sample: SampleSettings = SampleSettings()


def recipes():
    """{name: description} of the recipes inside the package."""
    files = sorted((f for f in _folder().iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): tomllib.loads(f.read_text("utf-8")).get("description", "") for f in files}


def load_settings(recipe, overrides=()):
    """Settings from a recipe's name or the path of a .toml file, with ``section.key=value`` overrides.

    Raises:
        SettingsError: no such recipe, not TOML, an unknown key, a wrong type, a value out of range.
    """
    raw = _read(recipe)
    for override in overrides:
        _apply(raw, override)
    return from_dict(raw)


def from_dict(raw):
    """Settings from nested dicts; SettingsError naming the field if they are not valid."""
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(e) for e in error.errors(include_url=False))) from error


def differences(old, new):
    """The fields, "section.key", in which a run may not be continued with ``new`` after ``old``."""
    old, new = _flat(old.model_dump()), _flat(new.model_dump())
    return [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)
            and key not in MAY_CHANGE and key.split(".")[0] not in MAY_CHANGE]


def _folder():
    return resources.files("fastflow") / "recipes"


def _read(recipe):
    if recipe.endswith(".toml"):
        source = Path(recipe)
        if not source.is_file():
            raise SettingsError(f"recipe: no such file: {recipe}")
        if source.stat().st_size > MAX_RECIPE_BYTES:
            raise SettingsError(f"recipe: {recipe} is larger than {MAX_RECIPE_BYTES} bytes")
    elif recipe in recipes():
        source = _folder() / f"{recipe}.toml"
    else:
        raise SettingsError(f"recipe: expected one of {', '.join(recipes())} or the path of a .toml file, "
                            f"got {recipe!r}")
    try:
        return tomllib.loads(source.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"recipe: {recipe} is not TOML: {error}") from error


def _apply(raw, override):
    """Sets one ``section.key=value``; the value is read as TOML, and as text where it isn't."""
    path, equals, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or len(keys) != 2 or not all(key.isidentifier() for key in keys):
        raise SettingsError(f"--set: expected section.key=value, got {override!r}")
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text
    except (ValueError, RecursionError):
        value = text
    section = raw.setdefault(keys[0], {})
    if not isinstance(section, dict):
        raise SettingsError(f"--set: {keys[0]} is not a section")
    section[keys[1]] = value


def _sentence(error):
    """One validation error as "section.key: what is wrong (got value)"."""
    keys = [str(key) for key in error["loc"]]
    if keys[:1] == ["model"] and len(keys) > 2:
        del keys[1]  # the kind, which pydantic puts between section and key
    field = ".".join(keys) or "settings"
    if error["type"] == "extra_forbidden":
        return f"{field}: unknown setting"
    if error["type"] == "missing":
        return f"{field}: missing"
    text = repr(error["input"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{field}: {message}, got {text if len(text) <= 60 else text[:57] + '...'}"


def _flat(nested):
    return {f"{section}.{key}" if isinstance(value, dict) else section: inner
            for section, value in nested.items()
            for key, inner in (value.items() if isinstance(value, dict) else [(None, value)])}
