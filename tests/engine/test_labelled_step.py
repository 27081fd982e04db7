"""Training steps with labels: what x is conditioned on (conditional VAE, M2 with some labels unknown) and what tasks
predict, in every way that a step runs, against loops written out by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from fastflow import flows, vae
from fastflow.engine import NonFiniteError, TrainStep
from fastflow.engine.objectives import NegativeELBO

SHAPE, N, D, B = (1, 3, 3), 3, 2, 6


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(seed):
    return (normal(B, *SHAPE, seed=seed) > 0).double()


def labels(seed):
    return torch.randint(N, (B,), generator=torch.Generator().manual_seed(seed))


def some_labels(seed):
    return labels(seed).masked_fill(torch.arange(B) % 2 == seed % 2, -1)


def tasks(*heads):
    objective = vae.PenalizedELBO(*heads)
    return vae.MLPVAE(SHAPE, D, (8,), objective=objective).double()


def one_task():
    return tasks(vae.Task(nn.Linear(D, N), vae.CategoricalLikelihood(N), weight=2.0))


def two_tasks():
    return tasks(vae.Task(nn.Linear(D, N), vae.CategoricalLikelihood(N), name="class"),
                 vae.Task(nn.Linear(D, 1), vae.GaussianLikelihood(0.5), name="size", weight=0.3))


def conditional():
    return vae.ConditionalVAE(SHAPE, D, N, (8,)).double()


def semi_supervised():
    parts = vae.ConditionalVAE(SHAPE, D, N, (8,))
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(9, N))
    return vae.SemiSupervisedVAE(parts.encoder, parts.decoder, classifier, N, alpha=0.7, latent_shape=D).double()


def bound(model, x, context=None):
    """(ELBO (B,), z (B, D)) from torch's own distributions, at the noise that the model draws."""
    inference = model.infer(x, context=context)
    z, (mean, logvar) = inference.z[0], inference.params.chunk(2, 1)
    output = model.decoder(z) if context is None else model.decoder(z, context)
    posterior = Normal(mean, (0.5 * logvar).exp())
    kl = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1)
    return Bernoulli(logits=output).log_prob(x).flatten(1).sum(1) - kl, z


def loss_of_one_task(model, x, context, targets):
    elbo, z = bound(model, x)
    return (2.0 * F.cross_entropy(model.objective.penalties[0].head(z), targets, reduction="none") - elbo).mean()


def loss_of_two_tasks(model, x, context, targets):
    elbo, z = bound(model, x)
    classes, sizes = (task.head(z) for task in model.objective.penalties)
    costs = F.cross_entropy(classes, targets["class"], reduction="none")
    costs = costs - 0.3 * Normal(sizes, 0.5).log_prob(targets["size"]).sum(1)
    return (costs - elbo).mean()


def loss_of_the_conditional(model, x, context, targets):
    return -bound(model, x, context)[0].mean()


def loss_of_m2(model, x, context, targets):
    every = torch.arange(N).repeat(B)
    joint = bound(model, x.repeat_interleave(N, 0), every)[0].view(B, N) - math.log(N)
    log_q, total = torch.log_softmax(model.classifier(x), 1), 0.0
    for i, label in enumerate(context.tolist()):
        if label < 0:
            total = total + (log_q[i].exp() * (joint[i] - log_q[i])).sum()
        else:
            total = total + joint[i, label] + 0.7 * log_q[i, label]
    return -total / B


# name: model, loss by hand, and the context and targets of a step
CASES = {
    "task": (one_task, loss_of_one_task, lambda seed: (None, labels(seed))),
    "tasks": (two_tasks, loss_of_two_tasks,
              lambda seed: (None, {"size": normal(B, 1, seed=seed + 50), "class": labels(seed)})),
    "conditional": (conditional, loss_of_the_conditional, lambda seed: (labels(seed), None)),
    "m2": (semi_supervised, loss_of_m2, lambda seed: (some_labels(seed), None)),
}


def adam(model):
    return torch.optim.Adam(model.parameters(), 1e-2, fused=True)


def compared(case, accumulate=1, **options):
    """Three updates of a TrainStep and of the loop by hand: the same losses and parameters, to rounding in float64."""
    make, by_hand, beside = CASES[case]
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    step, optimizer = TrainStep(model, adam(model), accumulate=accumulate, **options), adam(twin)
    for update in range(3):
        optimizer.zero_grad()
        for part in range(accumulate):
            seed = 10 * update + part
            x, (context, targets) = images(seed), beside(seed)
            torch.manual_seed(seed)
            loss = step(x, context, targets)
            torch.manual_seed(seed)
            expected = by_hand(twin, x, context, targets)
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
            (expected / accumulate).backward()
        optimizer.step()
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-9, atol=1e-11)
    return step


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_grad_norm": 1e9, "memory": "none"},
                                     {"check_finite": "late"}], ids=["eager", "accumulated", "late"])
@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_those_of_a_loop_by_hand(case, options):
    compared(case, **options)


@pytest.mark.parametrize("case", [pytest.param("tasks", marks=pytest.mark.slow), "m2"])
def test_compiled_steps_too(case):
    compared(case, compile="aot_eager")


def test_targets_train_a_vae_whose_prior_is_a_flow_in_memory_modes():
    """The probe of "auto" takes the targets of the images that it takes, and "save_z" computes the same."""
    torch.manual_seed(0)
    objective = vae.PenalizedELBO(vae.Task(nn.Linear(D, N), vae.CategoricalLikelihood(N)))
    model = vae.FlowPriorVAE(SHAPE, D, flow="realnvp", n_layers=2, flow_hidden=(4,), sizes=(8,),
                             objective=objective).double()
    twin, losses = copy.deepcopy(model), []
    for m, memory in ((model, "auto"), (twin, "save_z")):
        step = TrainStep(m, adam(m), memory=memory)
        torch.manual_seed(1)
        losses.append(step(images(0), targets=labels(0)))
    assert step.memory.saved > 0
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-9, atol=1e-12)


def test_parts_and_explanation_hold_the_task():
    step = compared("tasks")
    assert {"log_class", "log_size", "rate", "distortion"} <= step.parts.keys()
    before = copy.deepcopy(step.model.state_dict())
    text = step.explain(images(0), targets=CASES["tasks"][2](0)[1])
    assert "launches of fastflow's operators" in text
    torch.testing.assert_close(step.model.state_dict(), before, rtol=0, atol=0)


def test_a_target_that_is_not_finite_is_named_and_replayed():
    step = compared("tasks")
    context, targets = CASES["tasks"][2](0)
    before = copy.deepcopy(step.model.state_dict())
    with pytest.raises(NonFiniteError, match=r"the batch's targets\['size'\] is not finite"):
        step(images(0), targets=targets | {"size": targets["size"] * float("inf")})
    with pytest.raises(NonFiniteError, match=r"module 'objective.penalties.1' was the first"):
        step(images(0), targets=targets | {"size": targets["size"] * 1e200})  # its square overflows
    torch.testing.assert_close(step.model.state_dict(), before, rtol=0, atol=0)
    step(images(0), targets=targets)


@pytest.mark.parametrize(("make", "options", "error", "message"), [
    (one_task, {}, ValueError, "targets: expected the target of 'task'"),
    (one_task, {"targets": [0] * B}, TypeError, "targets: expected a torch.Tensor, got list"),
    (one_task, {"targets": labels(0)[:-1]}, ValueError, "targets: expected 6, one for each x"),
    (two_tasks, {"targets": {"class": torch.tensor(1)}}, ValueError, r"targets\['class'\]: expected 6"),
    (two_tasks, {"targets": {"class": labels(0)}}, ValueError, "targets: expected the target of 'size'"),
    (conditional, {"context": labels(0), "targets": labels(0)}, ValueError, "targets: this VAE maximises"),
    (conditional, {"context": [0] * B}, TypeError, "context: expected a torch.Tensor, got list"),
    (conditional, {"context": labels(0)[:1]}, ValueError, "context: expected 6, one for each x"),
    (semi_supervised, {"targets": labels(0)}, ValueError, "targets: a SemiSupervisedVAE takes none"),
    (two_tasks, {"targets": {"class": labels(0), "sizes": labels(0)}}, ValueError, "targets: .* got sizes"),
    (conditional, {"context": labels(0)[:-1]}, ValueError, "context: expected 6, one for each x"),
    (conditional, {"context": list(range(B))}, TypeError, "context: expected a torch.Tensor, got list"),
])
def test_what_can_not_be_beside_x_is_named(make, options, error, message):
    model = make()
    with pytest.raises(error, match=message):
        TrainStep(model, adam(model))(images(0), **options)


def test_a_flow_takes_no_targets():
    model = flows.RealNVP(4, n_layers=1, hidden=(4,))
    with pytest.raises(ValueError, match="targets: a RealNVP takes none"):
        TrainStep(model, adam(model))(torch.randn(3, 4), targets=labels(0)[:3])


def test_a_report_takes_what_the_loss_takes():
    """Held-out figures: the plain ELBO given the label, whatever the tasks and their weights."""
    x = images(0)
    for case in CASES:
        make, _, beside = CASES[case]
        torch.manual_seed(0)
        model, (context, targets) = make().eval(), beside(0)
        torch.manual_seed(1)
        report = NegativeELBO(2).report(model, x, context, targets)
        torch.manual_seed(1)
        result = model(x, context=context, **({} if targets is None else {"targets": targets}))
        torch.testing.assert_close(report["elbo"], -result.distortion - result.rate)
