"""What accelerate did to a model."""

__all__ = ["Report"]


class Report:
    """The layers of a model that were swapped, and those that were not and why.

    Attributes:
        swapped: {name of the layer in the model: class of the host library}.
        skipped: {name: why}, for every layer of a known library that stays as it is. A layer that verification puts
            back moves here from ``swapped``.
        verified: the names in ``swapped`` that were held against their originals; with ``verify=True`` the others
            wait for their first call.
    """

    def __init__(self):
        self.swapped, self.skipped, self.verified = {}, {}, set()

    def put_back(self, name, why):
        """A swapped layer became its original again."""
        self.swapped.pop(name, None)
        self.skipped[name] = why

    def __repr__(self):
        return f"Report(swapped={len(self.swapped)}, skipped={len(self.skipped)}, verified={len(self.verified)})"

    def __str__(self):
        lines = [f"{len(self.swapped)} layers swapped, {len(self.verified)} of them verified"]
        lines += [f"  {count} x {kind}" for kind, count in _counted(self.swapped.values())]
        if self.skipped:
            lines += [f"{len(self.skipped)} layers left alone"]
            lines += [f"  {count} x {why}" for why, count in _counted(self.skipped.values())]
        return "\n".join(lines)


def _counted(values):
    counts = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts.items()
