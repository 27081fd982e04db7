"""The tabular RealNVP of benchmarks.realnvp: training step, log_prob and sampling, as they are and as CUDA graphs."""

from benchmarks import contest, peers, realnvp
from benchmarks.gpu import measuring

FULL = {"n_layers": realnvp.N_LAYERS, "hidden": realnvp.HIDDEN}
TINY = {"n_layers": 2, "hidden": (8, 8)}
WANTED = {"training step": 10.0, "log_prob": 30.0, "sampling": 30.0}
WANTED_CAPTURED = 5.0


def case_of(work):
    """``work`` is one of realnvp.WORK."""
    def case(device, tiny):
        sizes, batch = (TINY, 64) if tiny else (FULL, realnvp.BATCH)
        x = realnvp.two_moons(batch).to(device)

        def own():
            return realnvp.fastflow_realnvp(**sizes).to(device)

        def peer(name, options):
            return measuring.flags_on_host(realnvp.peer_realnvp(name, **sizes, **options).to(device))

        def neutral():
            return realnvp.neutral_realnvp(realnvp.fastflow_realnvp(**sizes), sizes["hidden"]).to(device)
        act = realnvp.WORK[work]
        if act is contest.training_step:
            variants = {"fastflow": lambda: measuring.fastflow_step(own(), x, device),
                        "fastflow, captured": lambda: measuring.fastflow_step(own(), x, device, capture=True)}

            def graph(model):
                return measuring.captured_training_step(model, x, device)
        else:
            def graph(model):
                return measuring.captured(act(model, x), device)
            variants = {"fastflow": lambda: act(own(), x), "fastflow, captured": lambda: graph(own())}
        variants |= {"eager": lambda: act(neutral(), x), "eager, captured": lambda: graph(neutral()),
                     "normflows, captured": lambda: graph(peer("normflows", {}))}
        for name in peers.REALNVP:
            variants[name] = lambda n=name: contest.best(
                {setting: lambda n=n, o=options: act(peer(n, o), x)
                 for setting, options in contest.settings(n, "realnvp").items()})
        layers = "-".join(map(str, (1, *sizes["hidden"], 2)))
        yield measuring.measure(measuring.Contest(
            f"RealNVP {work}, 2-D, {sizes['n_layers']} couplings, MLP {layers}, batch {batch}", "realnvp", variants,
            batch, goals={("fastflow", "normflows"): WANTED[work],
                          ("fastflow, captured", "normflows, captured"): WANTED_CAPTURED}), device)
    return case
