"""Scores of generated points against laws whose scores are known."""

import math

import pytest
import torch
from geodesic.aeot import metrics


def test_ring_has_its_own_law(generator):
    """Fresh points of the ring: all modes, P(chi_2 <= 3) = 1 − exp(−9/2) within three deviations, KL near zero."""
    points, centres, deviation = metrics.ring(20_000, generator)
    found = metrics.coverage(points, centres, deviation)
    assert found.modes == 8
    want = 1 - math.exp(-4.5)
    assert abs(found.quality - want) < 4 * math.sqrt(want * (1 - want) / 20_000)  # Monte-Carlo, four standard errors
    assert found.reverse_kl < 4 * 7 / 20_000  # (k − 1)/(2n) on average; eight times that


def test_grid_has_25_centres_two_apart(generator):
    """The lattice −4, −2, 0, 2, 4 in both directions."""
    _, centres, deviation = metrics.grid(10, generator)
    assert deviation == 0.05
    assert centres.unique().tolist() == [-4, -2, 0, 2, 4]
    assert len(centres) == 25


def test_collapsed_samples_have_the_divergence_of_one_mode():
    """All samples at one of eight centres: one mode, quality 1, KL = log 8."""
    _, centres, deviation = metrics.ring(1, torch.Generator().manual_seed(0))
    found = metrics.coverage(centres[:1].repeat(50, 1), centres, deviation)
    assert (found.modes, found.quality) == (1, 1.0)
    assert found.reverse_kl == pytest.approx(math.log(8))


def test_samples_between_modes_have_no_quality():
    """The centre of the ring is 100 deviations from every mode."""
    _, centres, deviation = metrics.ring(1, torch.Generator().manual_seed(0))
    found = metrics.coverage(torch.zeros(5, 2), centres, deviation)
    assert (found.modes, found.quality) == (0, 0.0)


def test_reverse_kl_of_a_biased_coin():
    """p = (3/4, 1/4) against a fair coin: ¾ log 1.5 + ¼ log 0.5."""
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert metrics.reverse_kl(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])) == pytest.approx(want)


def test_frechet_distance_of_a_shift_is_its_square(generator):
    """Equal covariances: only the means differ."""
    x = torch.randn(100, 5, dtype=torch.float64, generator=generator)
    assert metrics.frechet_distance(x, x + 2) == pytest.approx(5 * 4, rel=1e-9)


def test_frechet_distance_of_a_scaling_is_the_variance(generator):
    """Covariances C and 9C with common mean zero: tr(C)(1 − 3)²."""
    x = torch.randn(100, 5, dtype=torch.float64, generator=generator)
    x = x - x.mean(0)
    assert metrics.frechet_distance(x, 3 * x) == pytest.approx(4 * float(torch.cov(x.T).trace()), rel=1e-9)


def test_precision_and_recall_of_a_subset(generator):
    """Fakes that are half of the real points, one of two clusters: all precise, half recalled."""
    left = torch.randn(50, 2, generator=generator)
    real = torch.cat([left, left + 100])
    precision, recall = metrics.precision_recall(real, left)
    assert (precision, recall) == (1.0, 0.5)


def test_copies_have_memorisation_ratio_zero(generator):
    train, test = torch.randn(2, 100, 3, generator=generator)
    assert metrics.memorisation_ratio(train[:20], train, test) == pytest.approx(0, abs=1e-2)  # float32 distances


def test_fresh_points_have_memorisation_ratio_one(generator):
    """Fakes of the law of the data: medians of 2000 nearest distances agree within ten per cent."""
    train, test, fake = torch.randn(3, 2000, 3, generator=generator)
    assert metrics.memorisation_ratio(fake, train, test) == pytest.approx(1, rel=0.1)


def test_classifier_learns_bright_from_dark(generator):
    """Two classes told apart by their mean: an accuracy of one after 60 steps."""
    y = torch.arange(200) % 2
    x = 0.1 * torch.randn(200, 1, 8, 8, generator=generator) + y[:, None, None, None]
    model = metrics.train_classifier(x, y, 2, generator, steps=60)
    assert torch.equal(model(x).argmax(1), y)
    assert model.features(x).shape == (200, 64)


def test_nearness_of_copies_and_of_strangers():
    """Fakes on the line at 0.1 from the training points k and 0.5 from the test points k + 0.6: ratio 0.1/0.5."""
    ticks = torch.arange(10.0)[:, None]
    assert metrics.nearness_ratio(ticks + 0.1, ticks, ticks + 0.6) == pytest.approx(0.2, rel=1e-5)
    longer = torch.cat([ticks, ticks + 0.1])  # what exceeds the smaller set does not count
    assert metrics.nearness_ratio(ticks + 0.1, longer, ticks + 0.6) == pytest.approx(0.2, rel=1e-5)
