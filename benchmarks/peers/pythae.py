"""VAEs in pythae, trained by its own trainer."""

import contextlib
import io
import logging
import tempfile

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig

from benchmarks.neutral_vae import plain


class _Encoder(BaseEncoder):
    def __init__(self, network):
        BaseEncoder.__init__(self)
        self.network = network

    def forward(self, x):
        mean, log_variance = self.network(x).chunk(2, 1)
        return ModelOutput(embedding=mean, log_covariance=log_variance)


class _Decoder(BaseDecoder):
    """pythae's cross-entropy takes probabilities."""

    def __init__(self, network):
        BaseDecoder.__init__(self)
        self.network = network

    def forward(self, z):
        return ModelOutput(reconstruction=torch.sigmoid(self.network(z)))


def epoch(vae, data, batch_size, learning_rate):
    """A callable that runs an epoch of pythae's BaseTrainer over ``data`` (N, *event): its VAE of bits with copies of a
    fastflow VAE's networks, and a fused Adam."""
    logging.getLogger("pythae").setLevel(logging.ERROR)
    config = VAEConfig(input_dim=tuple(data.shape[1:]), latent_dim=vae.latent_shape[0], reconstruction_loss="bce")
    model = VAE(config, _Encoder(plain(vae.encoder)), _Decoder(plain(vae.decoder)))
    folder = tempfile.TemporaryDirectory()
    training = BaseTrainerConfig(output_dir=folder.name, per_device_train_batch_size=batch_size, optimizer_cls="Adam",
                                 learning_rate=learning_rate, optimizer_params={"fused": True},
                                 no_cuda=data.device.type == "cpu")
    trainer = BaseTrainer(model, BaseDataset(data, torch.zeros(len(data))), training_config=training)
    trainer.prepare_training()

    def call():
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar is made, and shown nowhere
            trainer.train_step(epoch=1)
    call.folder = folder  # lives as long as the trainer
    return call
