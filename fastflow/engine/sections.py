"""The sections of a recipe that say what is modelled and by what: [data] and the kinds of [model]."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fastflow.data import DATASETS, FORMATS, OPTIONS, TABLES

__all__ = ["Count", "DataSettings", "Model", "Positive", "Section", "combination"]

Positive = Annotated[int, Field(ge=1, le=2**31)]
Count = Annotated[int, Field(ge=0, le=2**31)]
Sizes = Annotated[tuple[Positive, ...], Field(strict=False)]
SCALES = ("exp", "sigmoid", "tanh", "atan", "softplus", "rational", "glow", "additive")
BOUNDS = {"iwae": None, "miwae": "bound_groups", "ciwae": "bound_beta", "renyi": "bound_alpha", "stl": None,
          "dreg": None, "piwae": "bound_groups"}  # and the setting that each takes
PENALTIES = {"tc": 5.0, "factor": 10.0, "dip_i": 5.0, "dip_ii": 5.0, "mmd": 10.0, "adversarial": 1.0,
             "info_nce": 1.0}  # and the weight of each where none is given
SOURCES = {
    "cifar10": "cifar-10-python.tar.gz or cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
    "imagenet32": "the npz files of the 32x32 images (train_data_batch_1.npz to _10.npz, val_data.npz) from "
                  "https://image-net.org/download-images.php",
    "imagenet64": "the npz files of the 64x64 images (train_data_batch_1.npz to _10.npz, val_data.npz) from "
                  "https://image-net.org/download-images.php",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def combination(message):
    """The error of settings that don't go together; the message begins with the field."""
    return PydanticCustomError("combination", "{message}", {"message": message})


class DataSettings(Section):
    name: Literal[(*DATASETS, *TABLES)] | None = Field(None, description="data that ship with the libraries")
    path: str = Field("", description="or where your own lie; relative paths are from where the command is run")
    format: Literal[tuple(FORMATS)] | None = Field(None, description="what lies at the path; found out if not given")
    shape: Sizes = Field((), max_length=3, description="of one example, [C, H, W] or [D]; as the data have it if empty")
    columns: tuple[str, ...] = Field((), strict=False, description="names of a table's columns; as the data have them "
                                     "if empty")
    size: Positive | None = Field(None, description="scale pictures to size x size")
    test_fraction: float | None = Field(None, gt=0, lt=1, description="share held out where the data bring no split; "
                                                                       "0.1 if not given")
    validation_fraction: float = Field(0.0, ge=0, lt=1, description="share of the training part to choose a model by, "
                                                                    "where the data bring no validation part")
    verify: bool = Field(True, description="compare with the checksums that the source publishes")
    cache: str | None = Field(None, description="folder for the .npy files that ImageNet is mapped from; beside the "
                                                "data if not given")
    source: str = Field("", description="where to get what belongs at the path, said where it is missing")

    @model_validator(mode="after")
    def _go_together(self):
        if not self.path and self.name is None:
            raise combination("data: missing, name or path")
        if self.path and self.name is not None:
            raise combination(f"data.path: can't be combined with data.name={self.name}")
        options = OPTIONS.get(self.format) if self.path else ()
        for field, is_given in (("format", self.format is not None), ("size", self.size is not None),
                                ("test_fraction", self.test_fraction is not None), ("verify", not self.verify),
                                ("cache", self.cache is not None)):
            if is_given and options is not None and field not in (*options, *(["format"] if self.path else [])):
                raise combination(f"data.{field}: does not belong to {self.name or self.format} data")
        known = self.known_shape()
        if self.shape and known and self.shape != known:
            raise combination(f"data.shape: {self.name or self.format} data have {list(known)}, got {list(self.shape)}")
        if self.shape and len(self.shape) not in (1, 3):
            raise combination(f"data.shape: expected [C, H, W] or [D], got {list(self.shape)}")
        return self

    def known_shape(self):
        """Shape of one example, () where only the data themselves can tell."""
        if self.name is not None:
            return TABLES[self.name] if self.name in TABLES else DATASETS[self.name][0]
        return self.shape or (FORMATS.get(self.format) or ((),))[0]

    def where_from(self):
        """What to put at the path and where to get it, or ""."""
        return self.source or SOURCES.get(self.format, "")


class GlowSettings(Section):
    kind: Literal["glow"]
    n_levels: Positive = Field(3, description="scales; each halves height and width")
    n_steps: Positive = Field(8, description="flow steps per level: actnorm, 1x1 convolution, affine coupling")
    hidden_channels: Positive = Field(64, description="width of each coupling's network")
    scale: Literal[SCALES] = Field("tanh", description="map from the network's output to the scale; the clamped ones "
                                   "keep sampling stable; glow is the paper's sigmoid(s + 2)")
    parametrization: Literal["plain", "plu"] = Field("plain", description="of the 1x1 convolutions' weights")


class JetSettings(Section):
    kind: Literal["jet"]
    patch_size: Positive = Field(4, description="pixels along the side of a patch")
    channels: Positive = Field(512, description="width of the transformers, a multiple of heads")
    couplings: Positive = Field(32, description="number of couplings")
    depth: Positive = Field(2, description="layers of each coupling's transformer")
    heads: Positive = Field(8, description="attention heads")


class TarFlowSettings(Section):
    kind: Literal["tarflow"]
    patch_size: Positive = Field(2, description="pixels along the side of a patch")
    channels: Positive = Field(768, description="width of the transformers, a multiple of head_dim")
    blocks: Positive = Field(8, description="autoregressive blocks, which take turns in direction")
    layers_per_block: Positive = Field(8, description="layers of each block's transformer")
    head_dim: Positive = Field(64, description="width of an attention head")


class RealNVPSettings(Section):
    kind: Literal["realnvp"]
    n_layers: Positive = Field(8, description="couplings, which take turns on the two halves of the columns")
    hidden: Sizes = Field((64, 64), description="widths of the hidden layers of each coupling's network")
    scale: Literal[SCALES] = Field("tanh", description="map from the network's output to the scale")


class MAFSettings(Section):
    kind: Literal["maf"]
    n_layers: Positive = Field(5, description="autoregressive layers")
    hidden: Sizes = Field((64, 64), description="widths of the hidden layers of each MADE")
    activation: Literal["relu", "tanh"] = Field("relu", description="of the hidden units")
    order: Literal["reverse", "random"] = Field("reverse", description="order of the columns: in turns from first to "
                                                "last and back, or each at random")
    scale: Literal[SCALES] = Field("tanh", description="map from the network's output to the scale")


class NSFSettings(Section):
    kind: Literal["nsf"]
    n_layers: Positive = Field(10, description="couplings or autoregressive layers")
    hidden: Sizes = Field((64, 64), description="widths of the hidden layers of each layer's network")
    n_bins: int = Field(8, ge=2, le=1024, description="bins of each spline")
    tail_bound: float = Field(3.0, gt=0, description="beyond it, in standard deviations, a coupling is the identity")
    autoregressive: bool = Field(False, description="autoregressive layers in place of couplings; sampling goes column "
                                                    "by column")
    permutation: Literal["flip", "random"] = Field("random", description="of the columns between the layers")


class BoundSettings(Section):
    """What a VAE with Gaussian latents maximises."""

    objective: Literal[("elbo", *BOUNDS)] = Field("elbo", description="bound trained, or a gradient estimator of one "
                                                  "(stl of elbo; dreg and piwae of iwae)")
    n_samples: Positive = Field(1, description="draws of z per image, K of the bound")
    bound_groups: Count = Field(0, description="groups that the draws are cut into, of miwae and piwae")
    bound_beta: float | None = Field(None, ge=0, le=1, description="share of the ELBO, of ciwae")
    bound_alpha: float | None = Field(None, description="of renyi: elbo at 1, iwae at 0")
    free_bits: float = Field(0.0, ge=0, description="nats of the rate that each unit has free")

    @model_validator(mode="after")
    def _bound_goes_together(self):
        own = BOUNDS.get(self.objective)
        for name in ("bound_groups", "bound_beta", "bound_alpha"):
            value = getattr(self, name)
            given = value is not None and not (name == "bound_groups" and value == 0)
            if given != (name == own):
                raise combination(f"model.{name}: {'does not belong to' if given else 'needed by'} "
                                  f"model.objective={self.objective}")
        if self.objective not in ("elbo", "stl") and self.n_samples < 2:
            raise combination(f"model.n_samples: model.objective={self.objective} needs at least 2, got 1")
        if self.bound_groups and self.n_samples % self.bound_groups:
            raise combination(f"model.bound_groups: {self.bound_groups} does not divide model.n_samples="
                              f"{self.n_samples}")
        if self.free_bits and self.objective != "elbo":
            raise combination(f"model.free_bits: belongs to model.objective=elbo, got {self.objective}")
        if not self.free_bits and self.free_bits_per != type(self).model_fields["free_bits_per"].default:
            raise combination("model.free_bits_per: needs model.free_bits")
        return self


class PixelSettings(Section):
    sigma: Literal["shared", "pixel"] = Field("shared", description="of the Gaussian likelihood: one that fits all "
                                              "errors, or one for each pixel from the decoder")


class GaussianLatentSettings(PixelSettings):
    prior: Literal["normal", "flow"] = Field("normal", description="of z: N(0, I), or a flow that is trained along and "
                                             "leads samples to where the encoder puts images")


class VAESettings(BoundSettings, GaussianLatentSettings):
    kind: Literal["vae"]
    network: Literal["mlp", "conv"] = Field("mlp", description="networks of encoder and decoder")
    latent_features: Positive = Field(16, description="dimensions of z")
    hidden_features: Positive = Field(256, description="width of encoder and decoder, of mlp networks")
    beta: float = Field(1.0, ge=0, description="weight of the rate in the training loss")
    penalty: Literal[("none", *PENALTIES)] = Field("none", description="subtracted from the ELBO")
    penalty_weight: float | None = Field(None, gt=0, description="its factor; a usual one if not given")
    dataset_size: Count = Field(0, description="how many training images there are, of penalty tc")
    free_bits_per: Literal["dim", "group"] = Field("dim", description="unit that has them: each dimension of z, or all "
                                                   "together")

    @model_validator(mode="after")
    def _go_together(self):
        if self.free_bits and self.free_bits_per == "dim" and self.prior == "flow":
            raise combination("model.free_bits: no dimension has a KL of its own to model.prior=flow; use "
                              "model.free_bits_per=group")
        if self.penalty != "none" and self.objective != "elbo":
            raise combination(f"model.penalty: belongs to model.objective=elbo, got {self.objective}")
        if self.penalty == "none" and self.penalty_weight is not None:
            raise combination("model.penalty_weight: needs model.penalty")
        if (self.dataset_size > 0) != (self.penalty == "tc"):
            raise combination(f"model.dataset_size: {'needed by' if self.penalty == 'tc' else 'does not belong to'} "
                              f"model.penalty={self.penalty}")
        return self


class LabelledVAESettings(PixelSettings):
    latent_features: Positive = Field(16, description="dimensions of z")
    hidden_features: Positive = Field(256, description="width of encoder and decoder")
    n_classes: int = Field(ge=2, le=2**20, description="of the images' labels, which the data bring")
    beta: float = Field(1.0, ge=0, description="weight of the rate in the training loss")
    n_samples: Positive = Field(1, description="draws of z per image")


class ConditionalVAESettings(LabelledVAESettings):
    kind: Literal["conditional_vae"]


class SemiSupervisedVAESettings(LabelledVAESettings):
    kind: Literal["semi_supervised_vae"]
    n_labelled: Count = Field(0, description="training images whose label is used, evenly over the classes; 0 for all")
    alpha: float = Field(1.0, ge=0, description="weight of log q(label | image) where the label is known")


class TaskVAESettings(LabelledVAESettings, GaussianLatentSettings):
    kind: Literal["task_vae"]
    task_weight: float = Field(1.0, ge=0, description="weight of log p(label | z), of a linear layer on z")


class IWAESettings(GaussianLatentSettings):
    kind: Literal["iwae"]
    network: Literal["mlp", "conv"] = Field("mlp", description="networks of encoder and decoder")
    latent_features: Positive = Field(16, description="dimensions of z")
    n_importance: int = Field(10, ge=1, le=5000, description="importance samples per image, K of the bound trained")


class VQVAESettings(Section):
    kind: Literal["vqvae"]
    n_codes: int = Field(64, ge=2, le=2**20, description="vectors of the codebook")
    features: Positive = Field(8, description="dimensions of each code's vector")
    channels: Sizes = Field((32,), min_length=1, description="of the convolutions; each halves height and width")


class DiscreteVAESettings(PixelSettings):
    kind: Literal["discrete_vae"]
    latent_bits: Positive = Field(32, description="independent bits of z")
    hidden_features: Positive = Field(256, description="width of encoder and decoder")
    estimator: Literal["disarm", "rloo", "vimco", "reinforce"] = Field(
        "disarm", description="gradient estimator of the bits")
    n_samples: Positive = Field(4, description="samples of z per image, as the estimator takes them")
    prior: Literal["uniform", "autoregressive"] = Field("uniform", description="of the bits; the autoregressive one is "
                                                        "trained along")
    beta: float = Field(1.0, ge=0, description="weight of the rate in the training loss")

    @model_validator(mode="after")
    def _go_together(self):
        if self.estimator in ("rloo", "vimco") and self.n_samples < 2:
            raise combination(f"model.n_samples: model.estimator={self.estimator} needs at least 2, got 1")
        return self


class VDVAESettings(BoundSettings, PixelSettings):
    kind: Literal["vdvae"]
    groups: Sizes = Field((2, 2), min_length=1, description="latent groups at each resolution, coarsest first")
    channels: Positive = Field(32, description="of the states")
    latent_channels: Positive = Field(8, description="of each group")
    beta: float = Field(1.0, ge=0, description="weight of the rate in the training loss")
    free_bits_per: Literal["dim", "channel", "group"] = Field("group", description="unit that has them: each latent, "
                                                              "each channel of a level, or each level")
    kl_balance: bool = Field(False, description="weigh each level's rate by what each of its latents says, while the "
                                                "weight of the rate rises")

    @model_validator(mode="after")
    def _go_together(self):
        if self.kl_balance and (self.free_bits or self.objective != "elbo"):
            raise combination("model.kl_balance: belongs to model.objective=elbo without model.free_bits")
        return self


Model = (GlowSettings | JetSettings | TarFlowSettings | RealNVPSettings | MAFSettings | NSFSettings | VAESettings
         | ConditionalVAESettings | SemiSupervisedVAESettings | TaskVAESettings | IWAESettings | VQVAESettings
         | DiscreteVAESettings | VDVAESettings)
