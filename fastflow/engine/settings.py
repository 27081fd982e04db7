"""Recipes: TOML files that become typed settings. An unknown key or a wrong type is an error that names the field."""

import json
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from pydantic import Field, ValidationError, model_validator

from fastflow.engine.errors import SettingsError
from fastflow.engine.sections import Count, DataSettings, Model, Positive, Section, combination

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Settings", "described", "differences", "from_dict", "load_settings", "recipes"]

MAX_RECIPE_BYTES = 1 << 20
# What may change between a run and its continuation: how long it goes on and what it reports, never what it computes.
MAY_CHANGE = ("description", "minutes", "sample", "data.path", "data.cache", "data.verify", "data.source",
              "train.steps", "train.max_seconds", "train.device", "train.log_every", "train.tensorboard",
              "train.eval_every", "train.bound_samples", "train.patience", "train.sample_every", "train.collapse_every",
              "train.checkpoint_every", "train.keep_checkpoints", "train.strategy", "train.memory",
              "train.process_timeout", "train.skip_non_finite")

TABLE_KINDS = ("realnvp", "maf", "nsf")
# The schedules of the rate's weight, and which of the settings that shape it are theirs.
KL_SCHEDULES = {"linear": (), "cosine": (), "sigmoid": ("kl_steepness",), "cyclical": ("kl_cycles", "kl_ratio")}


class TrainSettings(Section):
    steps: Count = Field(description="training steps in all; may grow on resume")
    max_seconds: float = Field(0.0, ge=0, description="stop, save and evaluate after this long; 0 for no limit")
    batch_size: Positive = Field(32, description="images per step")
    learning_rate: float = Field(1e-3, gt=0, description="of Adam")
    beta2: float = Field(0.999, gt=0, lt=1, description="decay of Adam's average of squared gradients")
    weight_decay: float = Field(0.0, ge=0, description="as in AdamW, times the learning rate; 0 is Adam")
    warmup_steps: Count = Field(0, description="steps over which the learning rate rises linearly")
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="of the learning rate afterwards")
    end_learning_rate: float = Field(0.0, ge=0, description="where cosine and linear schedules end")
    decay_steps: Count = Field(0, description="the step at which they end; 0 for train.steps")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of conditioners, encoders and decoders; "
                                                      "all else is float32")
    memory: Literal["auto", "none", "save_z", "invert"] = Field("auto", description="how a flow keeps less for "
                                                                "backward, see TrainStep")
    kl_warmup_steps: Count = Field(0, description="steps over which a VAE's weight of the rate rises to model.beta, or "
                                   "the length of each cycle; 0 for none")
    kl_warmup_epochs: Count = Field(0, description="the same in epochs, each of one weight; 0 for none")
    kl_schedule: Literal[tuple(KL_SCHEDULES)] = Field("linear", description="how that weight rises")
    kl_begin: Count = Field(0, description="steps, or epochs, before it begins to")
    kl_start: float = Field(0.0, ge=0, description="the weight that it rises from")
    kl_steepness: float = Field(10.0, gt=0, description="of a sigmoid rise")
    kl_cycles: Count = Field(4, description="of a cyclical rise, after which the weight stays; 0 for ever")
    kl_ratio: float = Field(0.5, gt=0, le=1, description="share of each cycle in which the weight rises")
    capture: bool = Field(False, description="record the step as a CUDA graph; needs a GPU, one process a model")
    clip_grad_norm: float = Field(0.0, ge=0, description="scale larger gradients down to this norm; 0 for never")
    accumulate: Positive = Field(1, description="parts that a batch is cut into to save memory")
    strategy: Literal["auto", "ddp", "fsdp"] = Field("auto", description="whole models or shards; auto is ddp")
    process_timeout: float = Field(60.0, gt=0, description="seconds that a process waits for another before it fails")
    skip_non_finite: Count = Field(0, description="steps that are not finite that may be left out")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="average of the weights, to evaluate and sample; 0 for none")
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order and noise")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is cuda where torch sees a GPU")
    threads: int = Field(0, ge=0, le=4096, description="CPU threads; 0 leaves torch's choice, 1 is fastest for very "
                         "small models")
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(False, description="write TensorBoard's event file too")
    eval_every: Count = Field(0, description="steps between evaluations on held-out images; 0 for the end only")
    patience: Count = Field(0, description="evaluations in a row without a better one that end the run; 0 for never")
    bound_samples: Count = Field(0, description="K of a VAE's importance-weighted bound, held out, at the end; 0 "
                                "for as many samples as in training")
    sample_every: Count = Field(0, description="steps between sample grids; 0 for the end only")
    collapse_every: Count = Field(100, description="steps between looks for collapsed latents of a VAE; 0 for none")
    checkpoint_every: Count = Field(0, description="steps between checkpoints; 0 for the end only")
    keep_checkpoints: Count = Field(3, description="how many to keep; 0 for all")

    @model_validator(mode="after")
    def _go_together(self):
        if self.patience and not self.eval_every:
            raise combination("train.patience: counts evaluations, and train.eval_every=0 makes none on the way")
        if self.schedule == "constant" and (self.end_learning_rate or self.decay_steps):
            raise combination("train.end_learning_rate, train.decay_steps: train.schedule=constant has no end")
        if self.capture and self.memory in ("save_z", "invert"):
            raise combination(f"train.memory: {self.memory} can't be combined with train.capture")
        changed = [name for name, field in type(self).model_fields.items() if name.startswith("kl_")
                   and not name.startswith("kl_warmup") and getattr(self, name) != field.default]
        if self.kl_warmup_steps and self.kl_warmup_epochs:
            raise combination("train.kl_warmup_epochs: can't be combined with train.kl_warmup_steps; set that to 0")
        for name in changed:
            if not (self.kl_warmup_steps or self.kl_warmup_epochs):
                raise combination(f"train.{name}: shapes the rise of the rate's weight, and train.kl_warmup_steps=0 "
                                  "makes none")
            owners = [schedule for schedule, own in KL_SCHEDULES.items() if name in own]
            if owners and self.kl_schedule not in owners:
                raise combination(f"train.{name}: belongs to train.kl_schedule={owners[0]}, got {self.kl_schedule}")
        if self.batch_size % self.accumulate:
            raise combination(f"train.batch_size: {self.batch_size} is not a multiple of "
                              f"train.accumulate={self.accumulate}")
        if self.schedule != "constant" and self.end_learning_rate > self.learning_rate:
            raise combination(f"train.end_learning_rate: {self.end_learning_rate:g} is more than "
                              f"train.learning_rate={self.learning_rate:g}")
        return self


class SampleSettings(Section):
    count: int = Field(64, ge=1, le=4096, description="images in the grid")
    temperature: float = Field(1.0, gt=0, description="standard deviation of the base distribution when sampling")


class SweepSettings(Section):
    beta: tuple[Annotated[float, Field(gt=0)], ...] = Field(strict=False, min_length=2, description="a model is "
                                                            "trained with each, in place of model.beta")

    @model_validator(mode="after")
    def _differ(self):
        names = [f"{beta:g}" for beta in self.beta]  # of their directories
        for name in names:
            if names.count(name) > 1:
                raise combination(f"sweep.beta: expected different values, got {name} twice")
        return self


class Settings(Section):
    """Everything that defines a run."""

    description: str = Field("", description="what train --list says")
    minutes: float = Field(0.0, ge=0, description="about how long it takes on two CPU cores; 0 where that is not known")
    data: DataSettings
    model: Annotated[Model, Field(discriminator="kind")]
    train: TrainSettings
    sample: SampleSettings = SampleSettings()
    sweep: SweepSettings | None = None

    @model_validator(mode="after")
    def _go_together(self):
        shape, kind = self.data.known_shape(), self.model.kind
        if shape and (len(shape) == 1) != (kind in TABLE_KINDS):
            raise combination(f"model.kind: {kind} is for {'tables' if kind in TABLE_KINDS else 'images'}, and the "
                              f"data have shape {list(shape)}")
        if getattr(self.model, "kl_balance", False) and not (self.train.kl_warmup_steps or self.train.kl_warmup_epochs):
            raise combination("model.kl_balance: balances while the rate's weight rises, and train.kl_warmup_steps=0 "
                              "makes no rise")
        if getattr(self.model, "penalty", "none") != "none" and self.train.batch_size == self.train.accumulate:
            raise combination(f"model.penalty: {self.model.penalty} compares images, and train.batch_size / "
                              f"train.accumulate leaves one")
        if self.sweep is not None and not hasattr(self.model, "beta"):
            raise combination(f"sweep.beta: a model of kind {kind} has no beta")
        if self.sweep is not None and hasattr(self.model, "n_classes"):
            raise combination(f"sweep.beta: a model of kind {kind} takes labels, which a sweep does not give")
        return self


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


def described():
    """[(section.key, default, what it means)] of every setting, the model's by kind: "model (glow).n_steps"."""
    rows = []
    for section, field in Settings.model_fields.items():
        kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if hasattr(kind, "model_fields")]
        for kind in kinds:
            named = f" ({get_args(kind.model_fields['kind'].annotation)[0]})" if len(kinds) > 1 else ""
            rows += [_row(f"{section}{named}.{key}", inner) for key, inner in kind.model_fields.items()
                     if key != "kind"]
        if not kinds:
            rows.append(_row(section, field))
    return rows


def _row(name, field):
    kinds = (field.annotation, *get_args(field.annotation))
    choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    default = "needed" if field.is_required() else "" if field.default is None else json.dumps(field.default)
    return name, default, field.description + (f": {', '.join(choices)}" if choices else "")


def differences(old, new):
    """The fields, "section.key", in which a run may not be continued with ``new`` after ``old``; of models of two kinds
    the kind alone."""
    if old.model.kind != new.model.kind:
        return ["model.kind"]
    old, new = _flat(old.model_dump()), _flat(new.model_dump())
    return [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
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
    if keys == ["data", "path"]:
        section.pop("name", None)  # a recipe's own data give way to the user's
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
    if error["type"] == "combination":
        return error["msg"]
    if error["type"] == "union_tag_invalid":
        kinds, kind = error["ctx"]["expected_tags"].replace("'", ""), error["ctx"]["tag"]
        return f"{field}.kind: expected one of {kinds}, got {kind!r}"
    if error["type"] == "union_tag_not_found":
        return f"{field}.kind: missing"
    text = repr(error["input"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{field}: {message}, got {text if len(text) <= 60 else text[:57] + '...'}"


def _flat(nested):
    return {f"{section}.{key}" if isinstance(value, dict) else section: inner
            for section, value in nested.items()
            for key, inner in (value.items() if isinstance(value, dict) else [(None, value)])}
