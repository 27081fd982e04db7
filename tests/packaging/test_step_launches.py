"""The launches of a Glow training step, and that they are counted as for the published peers."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import step_launches

    return step_launches


def test_the_plain_model_counts_as_it_did_elsewhere(counts):
    """The counts of plain eager Glow at K=32, L=3 that the peers were measured beside."""
    found = counts.extrapolated(counts.of_neutral, 32)
    expected = {counts.CONV: 576, counts.CONDITIONER: 480, counts.COUPLING: 1056, counts.SPLIT: 288,
                counts.ACTNORM: 1152, counts.CONV1X1: 768}
    assert {name: found[name] for name in expected} == expected
    assert 3600 < counts.flow_specific(found) < 4000


@pytest.mark.parametrize("options", [{"check_finite": False}, {"clip_grad_norm": 1.0, "ema_decay": 0.99},
                                     {"check_finite": "late", "clip_grad_norm": 1.0, "ema_decay": 0.99}])
def test_a_step_stays_within_its_budget(counts, options):
    found = counts.extrapolated(counts.of_fastflow, 32, **options)
    assert found[counts.CONV] == 960 and found[counts.CONDITIONER] <= 96  # ten kernels of a network, and a sum with x's
    assert found.total() <= 1700 and found[counts.OPTIMIZER] <= 25
    assert counts.flow_specific(found) <= 500


def test_the_count_is_exact_where_it_is_not_extrapolated(counts):
    direct = counts.of_fastflow(5, n_levels=2).counts
    line = counts.extrapolated(counts.of_fastflow, 5, n_levels=2)
    assert all(line[name] == direct[name] for name in counts.CLASSES)


def test_deferral_is_put_back(counts):
    from fastflow.nn import channel_affine

    counts.of_fastflow(1, n_levels=1)
    assert {"cuda"} == channel_affine.DEFERRED_ON
