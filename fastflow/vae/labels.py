"""Labels: conditioning, semi-supervision, and tasks beside reconstruction."""

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import checks
from fastflow.estimators.latents import weighed
from fastflow.flows.labels import check_labels
from fastflow.vae.elbo import ELBO, check_beta
from fastflow.vae.generation import check_input, for_network
from fastflow.vae.likelihoods.base import promoted
from fastflow.vae.model import VAE
from fastflow.vae.objectives import Objective

__all__ = ["Conditioned", "SemiSupervisedVAE", "Task"]


class Conditioned(nn.Module):
    """A network that sees a context beside its input: network(cat of both along dim 1).

    It makes encoders and decoders of a conditional VAE from those of a plain one: module(x, context).

    Args:
        network: module of (B, C + context_features, *S).
        n_classes: the context is labels (B,) int64, seen as one-hots; None: it is (B, context_features).
        flatten: flatten x to (B, C) first, for fully connected networks.
        front: module that x alone goes through before, such as Rescale for integers, or None.
    """

    def __init__(self, network, n_classes=None, *, flatten=False, front=None):
        super().__init__()
        self.network = network
        self.n_classes = n_classes
        self.flatten = flatten
        self.front = front

    def forward(self, x, context=None):
        if context is None:
            raise ValueError("context: expected a tensor for a conditional network, got None")
        if self.front is not None:
            checks.tensor("x", x, floating=False)
            x = self.front(x)
        check_input(x, self.network, called="network")
        checks.tensor("context", context, floating=False)
        checks.same_device("context", context, "x", x)
        if self.n_classes is None:
            checks.goes_with("context", context, "x", x)
        context = one_hot(context, self.n_classes, x.dtype) if self.n_classes is not None else context.to(x.dtype)
        if context.dim() != 2 or context.shape[0] != x.shape[0]:  # len() would fix it in a graph
            raise ValueError(f"context: expected shape ({len(x)}, context_features), got {tuple(context.shape)}")
        x = x.flatten(1) if self.flatten else x
        context = context.view(*context.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        return self.network(torch.cat([x, context], 1))


def one_hot(labels, n_classes, dtype):
    """(B, n_classes) of labels (B,) int64."""
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"context: expected labels (B,) int64, got {labels.dtype} {tuple(labels.shape)}")
    check_labels("context", labels, n_classes, "n_classes", 0)
    return F.one_hot(labels, n_classes).to(dtype)


class SemiSupervisedVAE(VAE):
    """p(x, y) = p(y) integral of p(x | y, z) p(z), with q(y, z | x) = q(y | x) q(z | x, y): labels where they are
    known, summed over where not (M2).

    For a labelled example the bound on log p(x, y) is L(x, y) = ELBO(x | y) + log p(y); for an unlabelled one that on
    log p(x) is U(x) = sum_y q(y | x) L(x, y) + H(q(y | x)), whose gap is KL(q(y | x) || p(y | x)) plus the mean gaps of
    L. Both are in nats.

    Args:
        encoder, decoder: called with labels as second argument, see :class:`Conditioned`.
        classifier: module from x to logits (B, n_classes) of q(y | x).
        n_classes: number of classes.
        alpha: weight of log q(y | x), the classification loss, for labelled examples.
        label_logits: (n_classes,) of p(y), fixed, -inf for classes that never occur; None for the same for all.
        options: VAE's others but for an objective, whose place this one has.

    References:
        Kingma et al., "Semi-supervised learning with deep generative models", 2014, arXiv:1406.5298.
    """

    def __init__(self, encoder, decoder, classifier, n_classes, *, alpha=1.0, label_logits=None, **options):
        if options.get("objective") is not None:
            raise ValueError("objective: a SemiSupervisedVAE has one of its own")
        super().__init__(encoder, decoder, **options)
        n_classes = checks.count("n_classes", n_classes, 2)
        logits = torch.zeros(n_classes) if label_logits is None else label_logits
        checks.tensor("label_logits", logits)
        checks.shape("label_logits", logits, (n_classes,))
        self.classifier = classifier
        self.n_classes = n_classes
        self.alpha = alpha
        self.register_buffer("label_logits", logits.detach().clone())

    def forward(self, x, n_samples=1, beta=1.0, context=None, **noise):
        """The training objective: L(x, y) + alpha log q(y | x) where a label is known, U(x) where it is not.

        Args:
            context: labels (B,) int64, -1 for unknown; None: all unknown.

        Returns:
            Objective; its bound holds, example by example, the terms of L or of U. The rate counts the labels too,
            log q(y | x) - log p(y) on average, but beta weighs that of z alone: unlike a VAE's, the bound's ``elbo`` is
            not -distortion - beta * rate unless beta is 1.
        """
        unknown = torch.full((x.shape[0],), -1, device=x.device) if context is None else context
        checks.tensor("context", unknown, floating=False)
        if unknown.dtype != torch.int64 or unknown.shape != (x.shape[0],):
            raise ValueError(f"context: expected labels ({len(x)},) int64, got {unknown.dtype} {tuple(unknown.shape)}")
        check_labels("context", unknown, self.n_classes, "n_classes", -1)
        known = unknown >= 0
        every = self._every_label(x, n_samples, **noise)
        log_q = torch.log_softmax(self._class_logits(x), 1)
        # Weights (B, n_classes) of the labels: the known one, or q(y | x).
        given = F.one_hot(unknown.clamp_min(0), self.n_classes).to(log_q.dtype)
        weights = torch.where(known[:, None], given, log_q.exp())
        entropy = torch.where(known, 0.0, -weighed(log_q.exp(), log_q).sum(1))
        bound = self._weighed(every, weights, entropy, beta)
        classification = torch.where(known, weighed(given, log_q).sum(1), 0.0)
        parts = {"log_q_label": classification.detach().sum() / known.sum().clamp_min(1)}
        return Objective(bound.elbo + self.alpha * classification, bound, parts)

    def labelled(self, x, labels, n_samples=1, beta=1.0, **noise):
        """L(x, y), (B,) nats, of labels (B,) int64."""
        checks.tensor("labels", labels, floating=False)
        check_labels("labels", labels, self.n_classes, "n_classes", 0)
        bound = self.elbo(x, n_samples, beta, context=labels, **noise)
        return bound.elbo + torch.log_softmax(self.label_logits, 0)[labels]

    def unlabelled(self, x, n_samples=1, beta=1.0, **noise):
        """U(x), (B,) nats: every label in turn, weighed by q(y | x)."""
        every = self._every_label(x, n_samples, **noise)
        log_q = torch.log_softmax(self._class_logits(x), 1)
        return self._weighed(every, log_q.exp(), -weighed(log_q.exp(), log_q).sum(1), beta).elbo

    def classify(self, x):
        """q(y | x) (B, n_classes)."""
        return torch.softmax(self._class_logits(x), 1)

    def _class_logits(self, x):
        logits = promoted(self.classifier(x))
        checks.shape("classifier output", logits, (x.shape[0], self.n_classes))
        return logits

    def _every_label(self, x, n_samples, **noise):
        """The ELBO of x given every label, terms (..., B, n_classes)."""
        n, batch = self.n_classes, x.shape[0]
        labels = torch.arange(n, device=x.device).repeat(batch)
        bound = self.elbo(x.repeat_interleave(n, 0), n_samples, context=labels, **noise)
        return ELBO(*(term.unflatten(-1, (batch, n)) for term in bound))

    def _weighed(self, every, weights, entropy, beta):
        """The terms averaged over labels, log p(y) among log_pz and log q(y | x) among the rate. A label of weight 0
        counts nothing, even where log p(y) is -inf."""
        log_py = torch.log_softmax(self.label_logits, 0).to(weights.dtype)
        label_kl = -weighed(weights, log_py).sum(1) - entropy
        log_px_z = weighed(weights, every.log_px_z).sum(-1)
        log_pz = weighed(weights, every.log_pz + log_py).sum(-1)
        log_qz = weighed(weights, every.log_qz).sum(-1) - entropy
        latent_kl = weighed(weights, every.kl).sum(-1)
        kl = latent_kl + label_kl
        distortion = weighed(weights, every.distortion).sum(-1)
        check_beta(beta, latent_kl)
        elbo = -distortion - beta * latent_kl - label_kl
        return ELBO(log_px_z, log_pz, log_qz, log_px_z + log_pz - log_qz, kl, distortion, kl, elbo)


class Task(nn.Module):
    """A penalty: -weight * log p(target | z) of a head on the latents, so that they hold what the task needs.

    With weight 1 the objective is a bound on log p(x, target). Pass the target of each example as
    model(x, targets=...), or of a training step: (B, *event), or {name: target} for several tasks.

    Args:
        head: module from z (N, D, *S) to the likelihood's parameters.
        likelihood: of the target, as in likelihoods/: categorical for classes, Gaussian for regression.
        weight: factor.
        name: of this task among several.

    References:
        Maaloe et al., "Auxiliary deep generative models", 2016, arXiv:1602.05473; Locatello et al., "Disentangling
        factors of variation using few labels", 2020, arXiv:1905.01258.
    """

    of_targets = True

    def __init__(self, head, likelihood, *, weight=1.0, name="task"):
        super().__init__()
        self.head = head
        self.likelihood = likelihood
        self.weight = weight
        self.name = name

    def forward(self, model, inference, bound, *, targets=None, **_):
        target = targets.get(self.name) if isinstance(targets, dict) else targets
        if target is None:
            raise ValueError(f"targets: expected the target of {self.name!r}, got {targets!r}")
        k, b = inference.z.shape[:2]
        if target.shape[0] != b:
            raise ValueError(f"targets: expected {b} of {self.name!r}, got {len(target)}")
        output = self.head(for_network(inference.z.flatten(0, 1), self.head)).unflatten(0, (k, b))
        log_prob = self.likelihood.log_prob(target, output).mean(0)
        return -self.weight * log_prob, {f"log_{self.name}": log_prob.mean()}

    def predict(self, z):
        """The likelihood's mean, for classes the likeliest one, at z (N, D, *S); (N, 1) of targets (N,)."""
        return self.likelihood.mean(self.head(for_network(z, self.head)))
