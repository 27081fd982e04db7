"""The table of docs/scaling.md, from sizes on the meta device:  python -m benchmarks.scaling"""

from pathlib import Path

import torch

from fastflow import flows
from fastflow.engine.scaling import traffic

__all__ = ["PAGE", "main", "table"]

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
START, END = "<!-- table: python -m benchmarks.scaling -->", "<!-- end of table -->"
PROCESSES = (8, 32)
MODELS = {  # name: (constructor, configuration)
    "Glow, CIFAR-10": (flows.Glow, "cifar10"),
    "Glow, ImageNet 64": (flows.Glow, "imagenet64"),
    "TarFlow 2-1024-8-8, ImageNet 64": (flows.TarFlow, "imagenet64-2-1024-8-8"),
    "Jet 1B, ImageNet 64": (flows.Jet, "imagenet64-1b"),
}


def table():
    """Lines of Markdown."""
    lines = ["| model | parameters | processes | strategy | all-reduce | all-gather | reduce-scatter | "
             "each process sends | keeps of the parameters | and gathers at once |",
             "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|"]
    for name, (constructor, configuration) in MODELS.items():
        with torch.device("meta"):
            model = constructor.from_config(configuration)
        count = sum(p.numel() for p in model.parameters())
        for n in PROCESSES:
            sharded = traffic(model, n, "fsdp2", model.shard_groups())
            for strategy, found in (("DDP", traffic(model, n)), ("FSDP2", sharded)):
                cells = (found.all_reduce, found.all_gather, found.reduce_scatter, found.sent, found.parameters,
                         found.gathered)
                lines.append(f"| {name} | {count:,} | {n} | {strategy} | {' | '.join(map(_shown, cells))} |")
    return lines


def _shown(size):
    return f"{size / 1e6:,.1f} MB" if size else "-"


def main():
    before, _, rest = PAGE.read_text("utf-8").partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text("\n".join([before + START, "", *table(), "", END + after]), "utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
