"""Labels: conditional models, M2 against enumeration over the labels, tasks on the latents."""

import math

import pytest
import torch
from gaussian_models import linear, randn
from torch import nn
from torch.distributions import Categorical, MultivariateNormal, Normal, kl_divergence

from fastflow import vae

S2 = 0.6


class Classes:
    """x | y, z ~ N(w_y z + b_y, s2 I) with one latent: the posterior of z given x and y is a Gaussian. Six x."""

    def __init__(self, n_classes=3, size=4, seed=0):
        self.n_classes, self.size = n_classes, size
        self.w, self.b = 1.3 * randn(n_classes, size, seed=seed), randn(n_classes, size, seed=seed + 1)
        self.label_logits, self.x = randn(n_classes, seed=seed + 2), randn(6, size, seed=seed + 3)

    def __str__(self):
        return f"{self.n_classes}-{self.size}"

    def evidence(self, x):
        """log p(x | y), (B, n_classes)."""
        eye = S2 * torch.eye(self.size, dtype=torch.float64)
        return torch.stack([MultivariateNormal(b, torch.outer(w, w) + eye).log_prob(x)
                            for w, b in zip(self.w, self.b, strict=True)], 1)

    def joint(self, x):
        """log p(x, y), (B, n_classes)."""
        return self.evidence(x) + torch.log_softmax(self.label_logits, 0)


CLASSES = Classes()
W, B, X, SIZE, N_CLASSES = CLASSES.w, CLASSES.b, CLASSES.x, CLASSES.size, CLASSES.n_classes
INSTANCES = [CLASSES, Classes(2, 3, seed=10), Classes(5, 2, seed=20)]


class Encoder(nn.Module):
    """The true posterior of z given x and y."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.classes = classes

    def forward(self, x, y):
        w, b = self.classes.w[y], self.classes.b[y]
        precision = 1.0 + w.square().sum(1, keepdim=True) / S2
        mean = ((x - b) * w).sum(1, keepdim=True) / S2 / precision
        return torch.cat([mean, -precision.log()], 1)


class Decoder(nn.Module):
    def __init__(self, classes=CLASSES):
        super().__init__()
        self.classes = classes

    def forward(self, z, y):
        return z * self.classes.w[y] + self.classes.b[y]


class Classifier(nn.Module):
    """q(y | x): the true p(y | x), tempered."""

    def __init__(self, power=1.0, classes=CLASSES):
        super().__init__()
        self.power, self.classes = power, classes

    def forward(self, x):
        return self.power * self.classes.joint(x)


def m2(power=1.0, classes=CLASSES, **options):
    return vae.SemiSupervisedVAE(Encoder(classes), Decoder(classes), Classifier(power, classes), classes.n_classes,
                                 label_logits=classes.label_logits, likelihood=vae.GaussianLikelihood(math.sqrt(S2)),
                                 latent_shape=1, **options)


def sigma(batch):
    return torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None, None].expand(2, batch, 1)


@pytest.mark.parametrize("classes", INSTANCES, ids=str)
def test_m2_at_the_true_posteriors_is_the_evidence(classes):
    """U(x) = log sum_y p(y) p(x | y) and L(x, y) = log p(x, y), by enumeration over the labels."""
    x, n = classes.x, classes.n_classes
    joint, model, labels = classes.joint(x), m2(classes=classes), torch.tensor([0, 1, 2, 2, 1, 0]) % n
    torch.testing.assert_close(model.unlabelled(x, 2, eps=sigma(6 * n)), torch.logsumexp(joint, 1), rtol=0, atol=1e-11)
    torch.testing.assert_close(model.labelled(x, labels, 2, eps=sigma(6)), joint[torch.arange(6), labels], rtol=0,
                               atol=1e-11)
    torch.testing.assert_close(model.classify(x), torch.softmax(joint, 1))


@pytest.mark.parametrize("classes", INSTANCES, ids=str)
def test_m2_gap_is_the_classifiers_kl(classes):
    joint = classes.joint(classes.x)
    for power in (0.3, 2.0):
        model = m2(power, classes)
        gap = torch.logsumexp(joint, 1) - model.unlabelled(classes.x, 2, eps=sigma(6 * classes.n_classes))
        expected = kl_divergence(Categorical(logits=power * joint), Categorical(logits=joint))
        torch.testing.assert_close(gap, expected, rtol=0, atol=1e-11)
        assert (gap > 1e-4).any()


def test_m2_objective_takes_known_and_unknown_labels():
    """Example by example: L + alpha log q(y|x) where the label is known, U where it is -1; terms that add up."""
    model, labels = m2(0.5, alpha=0.7), torch.tensor([0, -1, 2, -1, 1, -1])
    result = model(X, 2, context=labels, eps=sigma(18))
    known = labels >= 0
    log_q = torch.log_softmax(model.classifier(X), 1)
    unlabelled = model.unlabelled(X, 2, eps=sigma(18))
    labelled = model.labelled(X, labels.clamp_min(0), 2, eps=sigma(6))
    classified = log_q[torch.arange(6), labels.clamp_min(0)]
    torch.testing.assert_close(result.value, torch.where(known, labelled + 0.7 * classified, unlabelled))
    torch.testing.assert_close(-result.distortion - result.rate, torch.where(known, labelled, unlabelled))
    torch.testing.assert_close(result.bound.log_w.mean(0), result.bound.elbo)
    torch.testing.assert_close(result.parts["log_q_label"], classified[known].mean())
    none = model(X, 2, eps=sigma(18))
    torch.testing.assert_close(none.value, unlabelled)


@pytest.mark.parametrize("masked", ["prior", "classifier", "both"])
def test_a_class_of_probability_zero_counts_nothing(masked):
    """Where p(y), or q(y | x), has none: enumerated over the others, gradients finite."""
    never = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64)
    model, labels = m2(0.5, alpha=0.7), torch.tensor([0, 1, 1, 0, 1, 0])
    joint = CLASSES.evidence(X)
    logits = (0.5 * CLASSES.joint(X)).requires_grad_()
    model.classifier.forward = lambda x: logits + never if masked != "prior" else logits
    if masked != "classifier":
        model.label_logits += never
    log_py, log_q = torch.log_softmax(model.label_logits, 0), torch.log_softmax(model.classifier(X), 1)
    rows = torch.arange(6)
    value = model(X, 2, context=labels, eps=sigma(18)).value
    expected = (joint + log_py + 0.7 * log_q)[rows, labels]
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), logits)[0], torch.autograd.grad(
        torch.log_softmax(model.classifier(X), 1)[rows, labels].sum() * 0.7, logits)[0])
    unlabelled = model.unlabelled(X, 2, eps=sigma(18))
    if masked == "prior":  # q(y | x) gives it some all the same
        assert (unlabelled == -math.inf).all()
        return
    each = joint + log_py - log_q
    expected = (log_q.exp() * each)[:, :2].sum(1)
    torch.testing.assert_close(unlabelled, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(model(X, 2, eps=sigma(18)).value, unlabelled)
    assert torch.autograd.grad(unlabelled.sum(), logits)[0].isfinite().all()


def test_m2_generates_by_label():
    x = m2().sample(30_000, torch.tensor([0, 2]), generator=torch.Generator().manual_seed(0))
    assert x.shape == (30_000, 2, SIZE)
    for column, y in enumerate((0, 2)):
        covariance = torch.outer(W[y], W[y]) + S2 * torch.eye(SIZE, dtype=torch.float64)
        products = (x[:, column] - B[y])[:, :, None] * (x[:, column] - B[y])[:, None]
        assert ((products.mean(0) - covariance).abs() < 4.5 * products.std(0) / math.sqrt(30_000)).all()


def test_conditional_vae():
    """The bound of p(x | label) is the class's evidence at its true posterior; ready networks train and generate."""
    model = vae.VAE(Encoder(), Decoder(), likelihood=vae.GaussianLikelihood(math.sqrt(S2)))
    labels = torch.tensor([2, 1, 0, 0, 1, 2])
    bound = model(X, n_samples=3, context=labels)
    evidence = CLASSES.evidence(X)[torch.arange(6), labels]
    torch.testing.assert_close(bound.log_w, evidence.expand(3, 6), rtol=0, atol=1e-11)
    mean = model.reconstruct(X, labels)
    torch.testing.assert_close(mean, Decoder()(Encoder()(X, labels)[:, :1], labels))

    ready = vae.ConditionalVAE((1, 4, 4), 3, 5, (16,), likelihood="bernoulli")
    x, y = torch.rand(6, 1, 4, 4).round(), torch.arange(6) % 5
    ready(x, context=y).elbo.sum().backward()
    assert all(p.grad is not None for p in ready.parameters())
    assert ready.sample(2, torch.arange(5)).shape == (2, 5, 1, 4, 4)
    assert ready.interpolate(x, x.flip(0), 4, context=y).shape == (4, 6, 1, 4, 4)
    assert ready.traverse(torch.zeros(3), context=y[:1]).shape == (3, 7, 1, 4, 4)


@pytest.mark.parametrize("likelihood", [vae.DiscretizedLogisticLikelihood(256), vae.CategoricalLikelihood(256),
                                        vae.PoissonLikelihood()])
def test_a_conditional_vae_scales_integers_as_others_do(likelihood):
    """With weights of 0 for the labels it is an MLPVAE, of integers too."""
    x, y = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8), torch.arange(8) % 3
    plain = vae.MLPVAE((1, 4, 4), 2, (8,), likelihood=likelihood)
    model = vae.ConditionalVAE((1, 4, 4), 2, 3, (8,), likelihood=likelihood)
    with torch.no_grad():
        for own, other, size in ((model.encoder, plain.encoder, 16), (model.decoder, plain.decoder, 2)):
            values = [torch.cat([p, p.new_zeros(len(p), 3)], 1) if p.shape[1:] == (size,) else p
                      for p in other.state_dict().values()]
            own.network.load_state_dict(dict(zip(own.network.state_dict(), values, strict=True)))
    for data in (x, x.float()):
        bound = model.elbo(data, context=y, seed=0)
        torch.testing.assert_close(bound.elbo, plain.elbo(data, seed=0).elbo)


def test_conditioned_networks_see_the_context():
    maps = vae.Conditioned(nn.Conv2d(1 + 3, 2, 1), 3)
    x = torch.randn(2, 1, 4, 4)
    expected = maps.network(torch.cat([x, torch.tensor([[0.0, 1, 0], [1, 0, 0]])[:, :, None, None].expand(2, 3, 4, 4)],
                                      1))
    torch.testing.assert_close(maps(x, torch.tensor([1, 0])), expected)
    plain = vae.Conditioned(nn.Linear(16 + 2, 3), flatten=True)
    assert plain(x, torch.randn(2, 2)).shape == (2, 3)


def test_tasks_bound_the_joint():
    """With a linear Gaussian decoder and head, x and the target are one pPCA: the objective at the true posterior of
    both is log p(x, t), to rounding."""
    s2t, w, v = 0.3, randn(SIZE, 2, seed=5), randn(1, 2, seed=6)
    stacked, noise = torch.cat([w, v]), torch.diag(torch.tensor([S2] * SIZE + [s2t], dtype=torch.float64))
    both = torch.cat([X, randn(6, 1, seed=7)], 1)
    evidence = MultivariateNormal(torch.zeros(5, dtype=torch.float64), stacked @ stacked.T + noise).log_prob(both)
    precision = torch.eye(2, dtype=torch.float64) + stacked.T @ torch.linalg.solve(noise, stacked)
    gain = torch.linalg.solve(precision, torch.linalg.solve(noise, stacked).T)
    lower = torch.linalg.cholesky(torch.linalg.inv(precision))

    class Known(nn.Module):
        """The true posterior's parameters, which need the target as well."""

        def forward(self, x):
            constants = torch.cat([lower.diagonal().log(), lower[1, :1]]).expand(len(x), 3)
            return torch.cat([both @ gain.T, constants], 1)

    task = vae.Task(linear(v, torch.zeros(1)), vae.GaussianLikelihood(math.sqrt(s2t)), name="t")
    model = vae.VAE(Known(), linear(w, torch.zeros(SIZE)), "full", likelihood=vae.GaussianLikelihood(math.sqrt(S2)),
                    objective=vae.PenalizedELBO(task))
    eps = math.sqrt(2) * torch.cat([torch.eye(2), -torch.eye(2)]).double()[:, None].expand(4, 6, 2)
    result = model(X, 4, targets={"t": both[:, 4:]}, eps=eps)
    torch.testing.assert_close(result.value, evidence, rtol=0, atol=1e-11)
    torch.testing.assert_close(task.predict(both @ gain.T), both @ gain.T @ v.T)
    with pytest.raises(ValueError, match="targets"):
        model(X, 4)
    heads = vae.PenalizedELBO(vae.Task(nn.Linear(2, 3).double(), vae.CategoricalLikelihood(3), weight=2.0), task)
    labels = torch.arange(6) % 3
    found = heads(model, X, 2, targets={"task": labels, "t": both[:, 4:]}, seed=0)
    z = model.infer(X, 2, seed=0).z
    log_y = torch.log_softmax(heads.penalties[0].head(z), 2)[:, torch.arange(6), labels].mean(0)
    log_t = Normal(z @ v.T, math.sqrt(s2t)).log_prob(both[:, 4:]).sum(2).mean(0)
    torch.testing.assert_close(found.value, found.bound.elbo + 2.0 * log_y + log_t)


def test_a_weight_of_the_rate_for_each_example():
    model, betas = m2(), torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    labels, eps = torch.tensor([0, -1, 2, -1, 1, -1]), torch.zeros(1, 6 * N_CLASSES, 1, dtype=torch.float64)
    found = model(X, beta=betas, context=labels, eps=eps).value
    each = [model(X, beta=beta.item(), context=labels, eps=eps).value[i] for i, beta in enumerate(betas)]
    torch.testing.assert_close(found, torch.stack(each))


TASK, Y = vae.Task(nn.Linear(2, 3), vae.CategoricalLikelihood(3)), torch.arange(6) % 3


def told(objective, targets):
    """A VAE with that objective that is given targets."""
    return vae.MLPVAE((SIZE,), 2, (4,), objective=objective)(X.float().sigmoid(), targets=targets)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: vae.SemiSupervisedVAE(Encoder(), Decoder(), Classifier(), 1), "n_classes"),
    (lambda: m2()(X, context=torch.zeros(6)), "context"),
    (lambda: vae.SemiSupervisedVAE(Encoder(), Decoder(), Classifier(), 3, objective=vae.PenalizedELBO()), "^objective"),
    (lambda: told(vae.PenalizedELBO(vae.FreeBits(0.1)), Y), "^targets: expected those of .* tasks .none., got some"),
    (lambda: told(vae.PenalizedELBO(TASK), {"task": Y, "digit": Y}), "^targets: .*.task., got digit"),
    (lambda: told(vae.PenalizedELBO(TASK), {}), "^targets: expected the target of 'task'"),
    (lambda: told(vae.BoundObjective("stl"), Y), "^targets: stl is a bound without a task"),
    (lambda: told(None, Y), "^targets"),
    (lambda: vae.Conditioned(nn.Linear(5, 2), 3)(torch.zeros(2, 2)), "context"),
    (lambda: vae.Conditioned(nn.Linear(5, 2), 3)(torch.zeros(2, 2), torch.zeros(2)), "context"),
    (lambda: vae.Conditioned(nn.Linear(5, 2))(torch.zeros(2, 2), torch.zeros(3, 3)), "context"),
    *((lambda call=call: call(vae.ConditionalVAE((SIZE,), 2, 3), X.float().sigmoid()), f"^context: expected {words}")
      for call, words in ((lambda model, x: model.elbo(x, context=3), "a torch.Tensor, got int"),
                          (lambda model, x: model.elbo(x, context=Y.to("meta")), "device cpu like x, got meta"),
                          (lambda model, x: model.sample(2, 3), "a torch.Tensor, got int"),
                          (lambda model, x: model.sample(2, Y[0]), r"shape \(B, ...\), got \(\)"))),
    (lambda: m2()(X, context=3), "^context: expected a torch.Tensor, got int"),
    (lambda: m2()(X, beta=torch.ones(7).double()), r"^beta: expected a number or shape \(\) or \(6,\), got \(7,\)"),
    (lambda: vae.ConditionalVAE((SIZE,), 2, 3).elbo(X.float().sigmoid(), context=Y + 1),
     "^context: expected labels below n_classes = 3, got 3"),
    (lambda: vae.ConditionalVAE((SIZE,), 2, 3).sample(2, Y - 1), "^context: expected labels from 0 on, got -1"),
    (lambda: m2()(X, context=torch.full((6,), 7)), "^context: expected labels below n_classes = 3, got 7"),
    (lambda: m2()(X, context=torch.full((6,), -2)), "^context: expected labels from -1 on, got -2"),
    (lambda: m2().labelled(X, torch.full((6,), -1)), "^labels: expected labels from 0 on, got -1"),
    (lambda: vae.SemiSupervisedVAE(Encoder(), Decoder(), nn.Linear(4, 2).double(), 3, latent_shape=1).unlabelled(X),
     r"^classifier output: expected shape \(6, 3\), got \(6, 2\)"),
    (lambda: vae.SemiSupervisedVAE(Encoder(), Decoder(), Classifier(), 3, label_logits=[0.0] * 3), "^label_logits"),
])
def test_errors_name_the_argument(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
