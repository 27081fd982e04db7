"""FrEIA under accelerate: every block, clamp and option, both directions, with conditions, in both frameworks."""

import pytest
import torch
from adapter_checks import accelerated, close, same, same_training, scattered
from torch import nn

import fastflow
from fastflow import extension
from fastflow.autograd import chain as chains

pytest.importorskip("FrEIA")
from FrEIA import framework, modules  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def dense(i, o):
    return nn.Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, o))


def odd(i, o):
    """A network that goes into no kernel."""
    return nn.Sequential(nn.Linear(i, 8), nn.ELU(), nn.Linear(8, o))


def convolutions(i, o):
    return nn.Sequential(nn.Conv2d(i, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, o, 1))


def both(*conditions):
    """forward and rev; FrEIA takes a list of conditions."""
    return [lambda t, x, *c, rev=rev: t((x,), c=list(c), rev=rev) for rev in (False, True)]


AFFINE = [modules.GLOWCouplingBlock, modules.RNVPCouplingBlock, modules.GINCouplingBlock,
          modules.AffineCouplingOneSided]


@DTYPES
@pytest.mark.parametrize("clamp", ["ATAN", "TANH", "SIGMOID"])
@pytest.mark.parametrize("kind", AFFINE)
def test_coupling_blocks(kind, clamp, dtype):
    for subnet, split in ((dense, 0.5), (odd, 2)):
        block = kind([(5,)], subnet_constructor=subnet, clamp=1.7, clamp_activation=clamp, split_len=split)
        same(scattered(block).to(dtype), both(), [torch.randn(6, 5, dtype=dtype)], 1)


@DTYPES
@pytest.mark.parametrize("kind", [*AFFINE, modules.NICECouplingBlock])
def test_conditions_and_images(kind, dtype):
    for subnet in (dense, odd):
        block = scattered(kind([(5,)], dims_c=[(3,)], subnet_constructor=subnet)).to(dtype)
        same(block, both(), [torch.randn(6, 5, dtype=dtype), torch.randn(6, 3, dtype=dtype)], 1)
    block = scattered(kind([(4, 3, 3)], dims_c=[(1, 3, 3)], subnet_constructor=convolutions)).to(dtype)
    same(block, both(), [torch.randn(2, 4, 3, 3, dtype=dtype), torch.randn(2, 1, 3, 3, dtype=dtype)], 1)


OPTIONS = [{}, {"gin_block": True}, {"permute_soft": True, "affine_clamping": 1.3}, {"reverse_permutation": True},
           {"learned_householder_permutation": 2, "reverse_permutation": True}, {"global_affine_type": "SIGMOID"},
           {"global_affine_type": "EXP"}]


@DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_in_one(options, dtype):
    for dims, shape, subnet in ((6, (), dense), (5, (), dense), (6, (), odd), (4, (2, 3), convolutions)):
        block = modules.AllInOneBlock([(dims, *shape)], dims_c=[(2, *shape)], subnet_constructor=subnet, **options)
        x, c = torch.randn(5, dims, *shape, dtype=dtype), torch.randn(5, 2, *shape, dtype=dtype)
        same(scattered(block).to(dtype), both(), [x, c], 1)


def trained(net, loss):
    """An accelerated copy of the net, both after the same three steps, which gave the same parameters. (Blocks of FrEIA
    hold functions that can't be pickled.)"""
    fused, _ = accelerated(net)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (net, fused)]
    for _ in range(3):
        for m, optimizer in zip((net, fused), optimizers, strict=True):
            optimizer.zero_grad()
            loss(m).backward()
            optimizer.step()
    for got, want in zip(fused.parameters(), net.parameters(), strict=True):
        close(got, want, 1e-10)
    return fused


def test_the_formula_is_that_of_the_release():
    """FrEIA 0.2 computes clamp * tanh(0.1 r), not clamp * tanh(0.1 r / clamp)."""
    block = modules.AllInOneBlock([(2,)], subnet_constructor=lambda i, o: nn.Linear(i, o), affine_clamping=3.0,
                                  gin_block=False, global_affine_type="EXP")
    with torch.no_grad():
        block.subnet.weight.zero_()
        block.subnet.bias.copy_(torch.tensor([4.0, 0.0]))
    fused, _ = accelerated(block.double())
    _, logdet = fused((torch.zeros(1, 2, dtype=torch.float64),))
    close(logdet, 3.0 * torch.tanh(torch.tensor([0.4], dtype=torch.float64)), 1e-12)


def test_frameworks_keep_their_references():
    """GraphINN's nodes and SequenceINN's list hold the same objects, so that both run the swapped layers."""
    sequence = framework.SequenceINN(6)
    for _ in range(3):
        sequence.append(modules.AllInOneBlock, subnet_constructor=dense, permute_soft=True)
    nodes = [framework.InputNode(6, name="in")]
    condition = framework.ConditionNode(2)
    for kind in (modules.GLOWCouplingBlock, modules.RNVPCouplingBlock):
        nodes.append(framework.Node(nodes[-1], kind, {"subnet_constructor": dense}, conditions=condition))
    nodes += [condition, framework.OutputNode(nodes[-1])]
    graph = framework.GraphINN(nodes)
    x, c = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    for net, inputs, count in ((sequence, [x], 4), (graph, [x, c], 2)):
        calls = [lambda t, x, *c, rev=rev: t(x, c=list(c), rev=rev) for rev in (False, True)]
        report = same(scattered(net).double(), calls, inputs, count)
        assert len(report.verified) == count
    fastflow.accelerate(graph)
    assert all(type(node.module).__module__ == "fastflow.adapters.freia_couplings" for node in graph.node_list
               if node.module is not None)


def test_published_example():
    """The README's network trains as it does without the one line."""
    inn = framework.SequenceINN(2)
    for _ in range(4):
        inn.append(modules.AllInOneBlock, subnet_constructor=dense, permute_soft=True)
    x = torch.randn(50, 2, dtype=torch.float64)

    def loss(model):
        z, log_jac_det = model(x)
        return (0.5 * torch.sum(z**2, 1) - log_jac_det).mean() / 2

    fused = trained(inn.double(), loss)
    z = torch.randn(10, 2, dtype=torch.float64)
    close(fused(z, rev=True)[0], inn(z, rev=True)[0], 1e-9)


def test_clamps_of_others_are_left_alone():
    block = modules.GLOWCouplingBlock([(4,)], subnet_constructor=dense, clamp_activation=lambda u: u / (1 + u.abs()))
    _, report = accelerated(block)
    assert "not one of FrEIA's own" in report.skipped[""] and not report.swapped


@pytest.mark.parametrize("subnet", [dense, odd])
@pytest.mark.parametrize("rows", [8, 2000])
@pytest.mark.parametrize("kind", AFFINE)
def test_a_clamp_that_is_set_later_counts(kind, rows, subnet):
    """Alone and in a sequence, which may take blocks into one kernel."""
    torch.manual_seed(0)
    alone, net = scattered(kind([(6,)], subnet_constructor=subnet)), chain((kind, None, {}), (kind, None, {}))
    x = torch.randn(rows, 6)
    for model, block, call in ((alone, lambda m: m, lambda m, rev: m((x,), rev=rev)[0][0]),
                               (net, lambda m: m.module_list[1], lambda m, rev: m(x, rev=rev)[0])):
        fused, _ = accelerated(model)
        call(fused, False)
        for one in (model, fused):
            block(one).f_clamp = torch.sin
        for rev in (False, True):
            close(call(fused, rev), call(model, rev), 1e-5)


def test_glow_blocks_train_the_same():
    net = nn.ModuleList([modules.GLOWCouplingBlock([(4,)], subnet_constructor=dense, clamp_activation="TANH")])
    x = torch.randn(20, 4, dtype=torch.float64)
    same_training(scattered(net), lambda m: m[0]((x,))[0][0].square().mean() - m[0]((x,))[1].mean())


def chain(*blocks, features=6):
    """A SequenceINN of (block class, condition, options)."""
    net = framework.SequenceINN(features)
    for kind, condition, options in blocks:
        shape = None if condition is None else ((2,), (3,))[condition]
        net.append(kind, cond=condition, cond_shape=shape, subnet_constructor=dense, **options)
    return scattered(net)


PLAIN = (modules.AllInOneBlock, None, {})
CHAINS = {  # how many kernels run of them
    "blocks and permutations": (1, [PLAIN, (modules.AllInOneBlock, None, {"reverse_permutation": True}),
                                    (modules.GLOWCouplingBlock, None, {"clamp": 1.3})]),
    "one condition": (1, [(modules.AllInOneBlock, 0, {}), (modules.GLOWCouplingBlock, 0, {})]),
    "conditions in turns": (3, [(modules.AllInOneBlock, 0, {}), PLAIN, PLAIN, (modules.AllInOneBlock, 1, {})]),
    "other blocks between": (2, [PLAIN, PLAIN, (modules.AllInOneBlock, None, {"gin_block": True}),
                                 (modules.GLOWCouplingBlock, None, {}), PLAIN]),
    "two kinds of scales": (1, [PLAIN, (modules.AllInOneBlock, None, {"global_affine_type": "EXP"})]),
    "a matrix between": (3, [PLAIN, PLAIN, (modules.AllInOneBlock, None, {"permute_soft": True}), PLAIN]),
}


@DTYPES
@pytest.mark.parametrize("name", CHAINS)
def test_sequences(name, dtype, monkeypatch):
    """Blocks in a row are one kernel, in both directions; what is between them keeps its own form."""
    kernels, blocks = CHAINS[name]
    net, inputs = chain(*blocks).to(dtype), [torch.randn(9, width, dtype=dtype) for width in (6, 2, 3)]
    calls = [lambda t, x, *c, rev=rev: t(x, c=list(c), rev=rev) for rev in (False, True)]
    same(net, calls, inputs, len(blocks) + 1)
    fused, _ = accelerated(net, verify=False)
    ran = []
    monkeypatch.setattr(extension, "observers", (lambda name, arguments: ran.append(name),))
    for call in calls:
        ran.clear()
        call(fused, *inputs)
        assert ran.count("mlp_flow_fwd") == kernels
    x, *c = (t.double() for t in inputs)
    trained(net.double(), lambda m: m(x, c=c)[0].square().mean())


def plain(kind, **options):
    return kind, None, options


NODES = {  # the steps of each node of autograd that runs of them
    "RNVP": ([4], [plain(modules.RNVPCouplingBlock), plain(modules.RNVPCouplingBlock, clamp=0.9)]),
    "GIN": ([4], [plain(modules.GINCouplingBlock), plain(modules.GINCouplingBlock, clamp_activation="SIGMOID")]),
    "mixed": ([6, 2], [plain(modules.GINCouplingBlock, clamp_activation="TANH"), plain(modules.RNVPCouplingBlock),
                       plain(modules.GLOWCouplingBlock, split_len=2), plain(modules.NICECouplingBlock),
                       plain(modules.GINCouplingBlock)]),
    "one with a condition": ([2, 2], [plain(modules.RNVPCouplingBlock), (modules.RNVPCouplingBlock, 0, {}),
                                      plain(modules.RNVPCouplingBlock)]),
}


@DTYPES
@pytest.mark.parametrize("name", NODES)
def test_sequences_as_nodes_of_autograd(name, dtype, monkeypatch):
    """Couplings that no kernel takes whole, in both directions, and twice differentiated."""
    lengths, blocks = NODES[name]
    net, inputs = chain(*blocks).to(dtype), [torch.randn(9, width, dtype=dtype) for width in (6, 2, 3)]
    calls = [lambda t, x, *c, rev=rev: t(x, c=list(c), rev=rev) for rev in (False, True)]
    same(net, calls, inputs, len(blocks) + 1)
    fused, _ = accelerated(net, verify=False)
    ran, run = [], chains.run
    monkeypatch.setattr(chains, "run", lambda x, steps: ran.append(len(steps)) or run(x, steps))
    for call, expected in zip(calls, (lengths, lengths[::-1]), strict=True):
        ran.clear()
        call(fused, *inputs)
        assert ran == expected
    if dtype is torch.float64:
        found = []
        for model in (net, fused):
            leaves = [inputs[0].clone().requires_grad_(), *model.parameters()]
            z, logdet = model(leaves[0], c=inputs[1:])
            first = torch.autograd.grad((z.exp() + torch.as_tensor(logdet).sum()).sum(), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
        for want, got in zip(*found, strict=True):
            close(got, want, 1e-10)


@pytest.mark.parametrize("width", [8, 512])  # as one kernel, and as nodes of autograd
@pytest.mark.parametrize("kinds", [(modules.NICECouplingBlock,) * 3,
                                   (modules.NICECouplingBlock, modules.GINCouplingBlock),
                                   (modules.NICECouplingBlock, modules.NICECouplingBlock, modules.GLOWCouplingBlock)])
def test_a_sequence_that_keeps_volume_says_so_by_the_same_number(kinds, width):
    net, x = framework.SequenceINN(4), torch.randn(5, 4)
    for kind in kinds:
        net.append(kind, subnet_constructor=lambda a, b: nn.Sequential(nn.Linear(a, width), nn.ReLU(),
                                                                       nn.Linear(width, b)))
    fused, report = accelerated(net)
    for rev in (False, True):
        (want, total), (got, logdet) = net(x, rev=rev), fused(x, rev=rev)
        close(got, want, 1e-5)
        assert type(logdet) is type(total) and torch.as_tensor(logdet).shape == torch.as_tensor(total).shape
    assert len(report.swapped) == 1 + len(kinds) and not report.skipped.keys() & {""}


def test_hooks_of_a_softplus_see_every_block():
    net, x, seen = chain(PLAIN, PLAIN, PLAIN), torch.randn(4, 6), []
    fastflow.accelerate(net, verify=False)  # in place: the function of a copied block is that of the first
    for block in net:
        block.softplus.register_forward_hook(lambda *args: seen.append(1))
    net(x)
    assert len(seen) == 3


def test_a_sequence_runs_hooks_and_tells_whether_it_gives_a_tuple():
    net, x, seen = chain(PLAIN, PLAIN, PLAIN), torch.randn(4, 6), []
    fused, report = accelerated(net)
    fused(x)
    assert report.verified == {"", "module_list.0", "module_list.1", "module_list.2"}
    fused[1].subnet[0].register_forward_hook(lambda *args: seen.append("inner"))
    fused[2].register_forward_hook(lambda *args: seen.append("block"))
    for got, want in zip(fused(x), net(x), strict=True):
        close(got, want, 1e-5)
    assert seen == ["inner", "block"]
    tuples = framework.SequenceINN(6, force_tuple_output=True)
    for _ in range(2):
        tuples.append(modules.AllInOneBlock, subnet_constructor=dense)
    same(tuples, [lambda t, x, rev=rev: t(x, rev=rev) for rev in (False, True)], [x], 3)
    _, report = accelerated(chain(PLAIN))
    assert "no two of its blocks" in report.skipped[""]


def test_a_subclass_in_a_sequence_is_reported():
    class Mine(modules.AllInOneBlock):
        pass

    _, report = accelerated(chain(PLAIN, PLAIN, (Mine, None, {})))
    assert report.skipped == {"module_list.2": "Mine is a subclass of FrEIA AllInOneBlock"}
    assert list(report.swapped) == ["", "module_list.0", "module_list.1"]


def test_a_sequence_compiles_whole():
    net, x = chain(PLAIN, PLAIN), torch.randn(4, 6)
    fused, _ = accelerated(net, verify=False)
    for got, want in zip(torch.compile(fused, fullgraph=True, backend="eager")(x), net(x), strict=True):
        close(got, want, 1e-5)


@pytest.mark.parametrize("rev", [False, True])
@pytest.mark.parametrize("image", [False, True])
def test_blocks_of_several_ranks_in_a_sequence(image, rev):
    """Those of the shape that comes in go together, whichever way round."""
    net = framework.SequenceINN(*((2, 3, 3) if image else (8,)))
    for _ in range(2):
        net.append(modules.AllInOneBlock, subnet_constructor=convolutions if image else dense)
    net.append(modules.Flatten) if image else net.append(modules.Reshape, output_dims=(4, 2))
    net.append(modules.AllInOneBlock, subnet_constructor=dense if image else lambda i, o: nn.Conv1d(i, o, 1))
    fused, _ = accelerated(scattered(net), verify=False)
    x = torch.randn(5, *(net.shapes[-1] if rev else net.shapes[0]))
    for got, want in zip(fused(x, rev=rev), net(x, rev=rev), strict=True):
        close(got, want, 1e-5)


def _to_the(power):
    return lambda a: torch.exp(power * a)


@pytest.mark.parametrize("functions", [(torch.exp, torch.exp), (_to_the(0.5), _to_the(1.5))],
                         ids=["builtin", "closures"])
def test_scales_through_functions_of_ones_own_are_computed_one_by_one(functions):
    net, x = chain(PLAIN, PLAIN), torch.randn(5, 6)
    for block, function in zip(net, functions, strict=True):
        block.global_scale_activation = function
    fused, _ = accelerated(net, verify=False)
    for got, want in zip(fused(x), net(x), strict=True):
        close(got, want, 1e-5)
