"""docs/benchmarks.md, written from the records under benchmarks/results:  python -m benchmarks.page

A table comes from the newest record that holds its rows; what has no record is named as not measured.
"""

import json
import sys
from pathlib import Path

from benchmarks import adapters, peers, table, toy2d
from benchmarks.gpu import table as gpu_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
NO_GAIN = 1.05  # a ratio below this is listed as no gain

HEAD = """\
# Benchmarks

Written by `python -m benchmarks.page` from the records under `benchmarks/results`; edit those, not this.

A ratio says how many times faster fastflow is: the quotient of medians of interleaved runs, first at one thread in CPU
time, then at all threads in wall time (missing where only one thread was measured). float32, the same fused Adam for
everybody. A contender other than fastflow runs in the fastest of its settings (memory format, form of the 1x1 weights,
kind of block), found anew in each regime. glibc's malloc keeps freed memory, for all of them: else the page faults of
its trimming would decide some rows by luck. The machine is shared with others; single ratios vary by 10 to 30 % from
run to run.
"""

GLOW = """\
A training step: forward, backward, optimiser; `log_prob` and sampling without gradients. `eager` is the same model in
plain, careful PyTorch, with equal weights. "The fastest peer" is the fastest of {fastest}, in
sampling of the first two; FrEIA does less work and stands beside them. `fastflow bench models`
"""

REALNVP = """\
`log_prob` and sampling without gradients. "The fastest peer" is the fastest of {fastest}. In two dimensions a
conditioner sees one feature, and what its first two layers make of it through ReLU is piecewise linear: fastflow's CPU
kernel has it from a table. In six dimensions it computes the products, as everybody does. `fastflow bench models`
"""

COMPILED = """\
The others under torch.compile, fastflow as it is; zuko and torchflows are missing, because their graphs break.
`fastflow bench compiled`
"""

EQUAL_TIME = """\
Bits/dim of held-out photographs, lower is better. The two of a pair start from equal weights and the same likelihood
and see the same batches in the same order with the same noise, learning rate and clipping; fastflow goes through
engine.TrainStep. Arguments: {arguments}. `python -m benchmarks.equal_time`
"""

EQUAL_STEPS = """\
Bits/dim of held-out photographs, lower is better, after equally many steps from equal weights on the same batches with
the same noise, in the same coordinates, in float64. Arguments: {arguments}. `python -m benchmarks.equal_steps`
"""

TOY2D = """\
KL(target || flow) in nats to densities known exactly (`fastflow.data.toy2d`), the mean over {seeds} seeds, then the
worst of them; "stated" is what a test holds the mean to. {steps} steps of {batch_size} draws; Monte-Carlo over
{evaluated} draws that training never saw. `python -m benchmarks.toy2d`
"""

LAUNCHES = """\
A training step of Glow 3x32x32, 3 levels x {n_steps} steps. A launch is a dispatched operator that is neither a view
nor an allocation, fastflow's own counted as the kernels that they declare: a lower bound of what a GPU launches, exact
on any machine. "Of the flow" leaves out the conditioners and the optimiser. "MB kept" is what a forward pass keeps for
backward, per image, on the CPU, parameters excluded, without recomputation. `python -m benchmarks.peer_launches`
"""

GPU_MODELS = """\
float32 with TF32 matrix products and convolutions for everybody, or bfloat16 conditioners where that is said; the same
fused Adam; medians of interleaved rounds in CUDA events. "Captured": the whole call as one CUDA graph. MFU is the
model's FLOPs over the time and the peak of an H200 (494 TFLOP/s in TF32, 989 in bfloat16). The conditioners of the Glow
below were products of cuBLAS between small kernels, in place of which Triton has kernels of its own since; those are
not timed yet. `python -m benchmarks.gpu_models`
"""

BANDWIDTH = """\
Forward and backward captured in a CUDA graph, so that no launch gap counts: the bytes that must move over the time, and
that over the rate of a plain copy in the same run. `python -m benchmarks.bandwidth`
"""

VAES = """\
A training step against the same networks in plain PyTorch (`eager`) with the same fused Adam, and epochs against
pythae's own trainer. Aims: {goals}. `python -m benchmarks.vae_speed`
"""

ADAPTERS = """\
Models of other libraries before and after `fastflow.accelerate(model)`: a training step, or what the case's name says.
The one line swaps normflows' conditioners too; "couplings alone" leaves them to the host, where they take three
quarters of a step: at most 1.3 would be gained if all else took no time. pythae's own fully connected networks are
swapped where the cpu backend's products beat PyTorch's; its latent head runs torch's generator in its kernel, which
draws the numbers that pythae does, and a node of autograd in Python is most of a small call. The layers on inputs of
64 x 8 show what a swap costs where there is little to gain.
`python -m benchmarks.adapters`
"""

SELF_CONSUMING = """\
Every generation is trained on samples of the one before, of which a share is replaced by fresh data. First Gaussians
fitted by maximum likelihood, exactly (`diagnostics.GaussianChain`): what the variance is multiplied with in a
generation without fresh data, and the least share that holds it within 5 %. Then VAEs: the total variance of their
samples over that of the data, in brackets a Gaussian's. Arguments: {arguments}. `python -m benchmarks.self_consuming`
"""

ELSEWHERE = {"xeon": ("On an Intel Xeon", """\
The tables above once more, on a processor of Intel's: `xeon-*.json`. PyTorch's BLAS and convolutions are faster there,
so what is mostly matrix products gains less, and those of wide networks are left to them; a call of Python costs more.
"""), "zen4": ("On an AMD EPYC of the fourth generation", """\
The tables above once more, on the generation before: `zen4-*.json`. What is mostly matrix products gains less there.
"""), "zen3": ("On an AMD EPYC of the third generation", """\
The tables above once more, on a processor without AVX-512: `zen3-*.json`. Products of wide networks are left to
PyTorch's BLAS there, too.
""")}  # {a record's prefix: (title, words)}

OPERATIONS = """\
Forward and backward unless said otherwise, beside careful eager PyTorch, torch.compile, torch's batched call and a
loop. `fastflow bench ops`
"""


def records(pattern):
    """The records of that name in RESULTS, newest first."""
    found = [json.loads(path.read_text("utf-8")) for path in RESULTS.glob(pattern)]
    return sorted(found, key=lambda record: record["machine"]["date"], reverse=True)


def newest(device, wanted):
    """The newest record of `fastflow bench` on a device with rows that are ``wanted``, or None."""
    return next((record for record in records(f"{device}-*.json")
                 if any("case" in row and wanted(row) for row in record.get("rows", ()))), None)


def _differences(differences):
    return ["", "In what each model differs:", "", *(f"- {name}: {text}" for name, text in differences.items())]


def _section(title, words, record, lines, after=()):
    if record is None:
        return [f"## {title}", "", "Not measured yet.", ""]
    return [f"## {title}", "", *words.rstrip().splitlines(), "", table.machine(record) + ".", "", *lines(record),
            *after, ""]


def _settings(record, group):
    chosen = table.settings({"rows": [row for row in record["rows"] if row["group"] == group]})
    return ["", "Settings that were the fastest:", "", *chosen] if chosen else []


def _memory(record):
    """Peaks of memory, a line each."""
    found = [f"- {row['case']}: " + ", ".join(f"{name} {peak:.1f} MiB" for name, peak in row["peak_mib"].items())
             for row in record["memory"]] if record else []
    return ["", *found] if found else []


def _vaes():
    """The section of the newest record of benchmarks.vae_speed."""
    record = next(iter(records("cpu-vae-speed-*.json")), None)
    goals = ", ".join(f"{name} {goal:g}" for name, goal in record["goals"].items()) if record else ""
    return _section("VAEs", VAES.format(goals=goals), record,
                    lambda record: table.markdown(record, baselines=("eager", "compile", "pythae")), _memory(record))


def _adapters():
    """The section of the newest record of benchmarks.adapters."""
    record = next(iter(records("cpu-adapters-*.json")), None)
    return _section("Models of other libraries, accelerated", ADAPTERS, record,
                    lambda record: table.markdown(record, baselines=("original", "couplings alone")),
                    _head_share(record))


def _head_share(record):
    """The share of a step that pythae's latent head takes by itself."""
    original = {row["case"]: row["median_us"].get("original") for row in (record["rows"] if record else ())}
    head, step = (original.get(name) for name in (f"{adapters.LATENT_HEAD}, 100 x 16", adapters.PYTHAE_STEP))
    return [] if None in (head, step) else [
        "", f"pythae's latent head, 100 x 16, is {head / step:.1%} of the original's step of the VAE above it."]


def _self_consuming(record):
    """Two tables: Gaussians in closed form, and chains of VAEs."""
    lines = ["| examples | temperature | variance a generation | generations to half or double | least fresh share |",
             "|---|---|---|---|---|"]
    for row in record["gaussians"]:
        lines.append(f"| {row['n']} | {row['temperature']:g} | x {row['factor_a_generation']:.4f} | "
                     f"{row['generations_to_half_or_double']} | {row['least_fresh_share']:g} |")
    marks = list(record["vaes"][0]["variance"])
    lines += ["", "| VAEs: temperature | fresh share | " + " | ".join(f"generation {g}" for g in marks) + " |",
              "|---|---" + "|---" * len(marks) + "|"]
    for row in record["vaes"]:
        cells = " | ".join(f"{row['variance'][g]:.2f}" + (f" ({row['gaussian'][g]:.2f})" if row["gaussian"] else "")
                           for g in marks)
        lines.append(f"| {row['latent_temperature']:g} | {row['fresh_share']:g} | {cells} |")
    return lines


OPERATION_GROUPS = ("affine_coupling", "gaussian_sample_kl", "bernoulli_log_prob", "wide_mlp", "conv_net",
                    "activated_conv", "mlp_flow", "spline", "slogdet")


def _by_group(record):
    """A table for every group of operations that the record holds."""
    return [table.markdown(record, (group,)) for group in OPERATION_GROUPS
            if any(row["group"] == group for row in record["rows"])]


def _device(device):
    """The sections of one device."""
    def ratios(*groups):
        def lines(record):
            return [*table.markdown(record, groups), *(line for group in groups for line in _settings(record, group))]
        return lines

    def of(group):
        return newest(device, lambda row: row["group"] == group and "over_fastest" in row)

    where = "" if device == "cpu" else f", {device}"
    operations = newest(device, lambda row: row["group"] == "slogdet")
    parts = [
        _section(f"Glow beside other libraries{where}", GLOW.format(fastest=", ".join(peers.FASTEST_GLOW)), of("glow"),
                 ratios("glow"), _differences(peers.GLOW_DIFFERENCES)),
        _section(f"Tabular RealNVP beside other libraries{where}",
                 REALNVP.format(fastest=", ".join(peers.FASTEST_REALNVP)), of("realnvp"),
                 ratios("realnvp", "realnvp wider"),
                 _differences(peers.REALNVP_DIFFERENCES)),
        _section(f"Tabular RealNVP, the others compiled{where}", COMPILED, of("realnvp compiled"),
                 ratios("realnvp compiled")),
        _section(f"Operations{where}", OPERATIONS, operations,
                 lambda record: [line for lines in _by_group(record) for line in (*lines, "")][:-1])]
    shown = [(of("glow"), ("glow",)), (of("realnvp"), ("realnvp", "realnvp wider")),
             (of("realnvp compiled"), ("realnvp compiled",)), (operations, OPERATION_GROUPS)]
    if device == "cpu":
        parts[3:3] = [_vaes(), _adapters()]
        shown += [(next(iter(records(f"cpu-{name}-*.json")), None), None) for name in ("vae-speed", "adapters")]
    return [line for part in parts for line in part] + _no_gain(device, shown)


def _losses(shown):
    """A line for every comparison in the tables of ``shown`` in which fastflow gains less than NO_GAIN."""
    return [f"- {row['case']}{table.regime(row)}: {ratio:.2f} over {name}"
            for record, groups in shown for row in (record["rows"] if record else ())
            if groups is None or row["group"] in groups
            for name, ratio in row["speedup_over"].items() if ratio < NO_GAIN]


def _no_gain(device, shown):
    """Every comparison in the tables of ``shown``, [(record or None, its groups or None for all)], in which fastflow
    gains less than NO_GAIN."""
    found = _losses(shown)
    where = "" if device == "cpu" else f", {device}"
    return [f"## No gain{where}", "", f"Every ratio above that is below {NO_GAIN}:", "", *(found or ["- none"]), ""]


def _elsewhere(prefix, title, words):
    """The section of the newest records on another processor; nothing where there is none."""
    models = ("glow", "realnvp", "realnvp wider")
    tables = {"all": lambda record: (table.markdown(record, models, ("eager", table.FASTEST)), *_by_group(record)),
              "vae-speed": lambda record: (table.markdown(record, baselines=("eager", "pythae")),),
              "adapters": lambda record: (table.markdown(record, baselines=("original", "couplings alone")),)}
    newest_of = {name: next(iter(records(f"{prefix}-{name}-*.json")), None) for name in tables}
    found = [record for record in newest_of.values() if record is not None]
    if not found:
        return []
    lines = [f"## {title}", "", *words.rstrip().splitlines(), ""]
    for name, record in newest_of.items():
        if record is not None:
            lines += [table.machine(record) + ".", "",
                      *(line for part in tables[name](record) for line in (*part, ""))]
    lines += [f"### No gain there, every ratio below {NO_GAIN}", "",
              *(_losses([(record, None) for record in found]) or ["- none"]), ""]
    return lines


def _gpu_models():
    """The section of the newest record of benchmarks.gpu_models; nothing where there is none."""
    record = next(iter(records("cuda-gpu-models-*.json")), None)
    if record is None:
        return []
    losses = gpu_table.no_gain(record, NO_GAIN)
    lines = _section("Whole models on a GPU", GPU_MODELS, record, gpu_table.markdown)[:-1]
    return [*lines, f"### No gain among these, every ratio below {NO_GAIN}", "", *(losses or ["- none"]), ""]


def _bandwidth():
    """The section of the newest record of benchmarks.bandwidth; nothing where there is none."""
    record = next(iter(records("cuda-bandwidth-*.json")), None)
    return [] if record is None else _section("Kernels and the speed of memory", BANDWIDTH, record,
                                              gpu_table.bandwidth)


def _arguments(record):
    return ", ".join(f"{key} {value}" for key, value in record["arguments"].items()) if record else ""


def render():
    """The page as a string."""
    equal_time, equal_steps, record, launches = (
        next(iter(records(f"cpu-{name}-*.json")), None)
        for name in ("equal-time", "equal-steps", "toy2d", "peer-launches"))
    lines = [HEAD]
    gpu, models = newest("cuda", lambda row: "speedup_over" in row), _gpu_models()
    if gpu is None and not models:
        lines += ["Nothing on this page has been measured on a GPU. Launches are counts, not times.", ""]
    lines += _section("Equal wall time", EQUAL_TIME.format(arguments=_arguments(equal_time)), equal_time,
                      table.equal_time)
    lines += _section("Equal steps", EQUAL_STEPS.format(arguments=_arguments(equal_steps)), equal_steps,
                      table.equal_steps)
    words = TOY2D.format(**record["arguments"]) if record else ""
    lines += _section("Densities known exactly", words, record, lambda record: table.toy2d(record, toy2d.STATED))
    chains = next(iter(records("cpu-self-consuming-*.json")), None)
    lines += _section("Models trained on their own samples", SELF_CONSUMING.format(arguments=_arguments(chains)),
                      chains, _self_consuming)
    lines += _section("Launches and memory", LAUNCHES.format(n_steps=launches["n_steps"] if launches else ""), launches,
                      table.launches)
    for device in ("cpu",) if gpu is None else ("cpu", "cuda"):
        lines += _device(device)
    for prefix, (title, words) in ELSEWHERE.items():
        lines += _elsewhere(prefix, title, words)
    lines += models + _bandwidth()
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(), "utf-8")
    print(f"written to {PAGE}")
    sys.exit(0)
