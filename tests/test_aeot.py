"""AE-OT and its rivals on problems small enough to know the answer; the recorded runs on tiny settings."""

import dataclasses
import math

import pytest
import torch
from geodesic import __main__, aeot, records, semidiscrete
from geodesic.aeot import _fit, metrics, runs
from torchvision.io import decode_image

TINY = aeot.Recipe(code=2, width=32, steps=150, batch=64, rate=5e-3, tol=0.2)


@pytest.fixture(scope="module")
def two_blobs():
    """Forty points in two tight groups, eight apart."""
    g = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(40, 2, generator=g) + torch.tensor([4.0, 0.0]) * (2 * (torch.arange(40) % 2) - 1)[:, None]


@pytest.fixture(scope="module")
def model(two_blobs):
    return aeot.fit(two_blobs / 4, "ae-ot", TINY, torch.Generator().manual_seed(1))


def test_discrete_samples_are_decoded_training_codes(model, two_blobs):
    """Every sample is the reconstruction of some training point."""
    with torch.no_grad():
        known = model.decode(model.encode(two_blobs / 4))
    samples = model.sample(100, "discrete", torch.Generator().manual_seed(2))
    assert torch.cdist(samples, known).amin(1).max() < 1e-3  # float32 distances


def test_discrete_samples_share_out_the_noise(model):
    """Half of the mass belongs to each group; the relative error of a cell is certified to 20 %."""
    left = model.sample(2000, "discrete", torch.Generator().manual_seed(3))[:, 0] < 0
    assert abs(float(left.double().mean()) - 0.5) < 0.2 / 2 / math.sqrt(20) + 4 * 0.5 / math.sqrt(2000)


def test_continuous_samples_bridge_the_groups_and_aware_ones_do_not(model):
    """A continuous map cannot split its support; the singularity-aware one jumps. A wide bandwidth shows both."""
    reach = float(model.potential.points[:, 0].abs().max())
    wide = dataclasses.replace(model, potential=dataclasses.replace(model.potential, bandwidth=reach))
    noise = semidiscrete.draw(4000, 2, "normal", torch.Generator().manual_seed(4))
    centre = model.potential.points.mean(0)
    half = (model.potential.points - centre).norm(dim=1).median() / 2
    between = {mode: ((wide.codes(noise, mode) - centre).norm(dim=1) < half).sum() for mode in aeot.MODES}
    assert between["extended"] > 10
    assert between["singularity-aware"] == between["discrete"] == 0


@pytest.mark.parametrize("method", aeot.METHODS)
def test_every_method_gives_finite_points_of_the_right_shape(method, two_blobs):
    recipe = aeot.Recipe(code=2, width=16, steps=3, tol=0.5)
    samples = aeot.fit(two_blobs, method, recipe).sample(7, "discrete")
    assert samples.shape == (7, 2)
    assert samples.isfinite().all()


@pytest.mark.parametrize("method", aeot.METHODS)
def test_every_method_handles_images(method, generator):
    recipe = aeot.Recipe(code=3, width=8, steps=2, batch=4, tol=0.5)
    images = torch.randn(12, 1, 8, 12, generator=generator)
    assert aeot.fit(images, method, recipe).sample(5, "discrete").shape == (5, 1, 8, 12)


def test_same_generator_same_model(two_blobs):
    recipe = aeot.Recipe(code=2, width=8, steps=5, tol=0.5)
    first, second = (aeot.fit(two_blobs, "vae", recipe, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.sample(3, generator=torch.Generator()), second.sample(3, generator=torch.Generator()))


def test_autoencoder_loss_falls(model):
    assert model.losses[-1] < model.losses[0] / 10


def test_split_angle_lies_between_two_groups():
    """Angles near 0.1 and near 1: the threshold is between the groups."""
    folds = torch.cat([torch.linspace(0.05, 0.15, 90), torch.linspace(0.9, 1.1, 10)])
    assert 0.15 < aeot.split_angle(folds) < 0.9


def test_gradient_penalty_of_a_linear_critic_is_known(generator):
    """Critic x ↦ 3x₁: the slope has norm 3 everywhere, so the penalty is (3 − 1)² and the other terms cancel."""
    critic = torch.nn.Linear(2, 1, bias=False)
    critic.weight.data = torch.tensor([[3.0, 0.0]])
    real = torch.randn(6, 2, generator=generator)
    loss = _fit._critic_loss(critic, real, real.clone(), "wgan-gp", aeot.Recipe(), generator)
    assert float(loss.detach()) == pytest.approx(10 * 4, rel=1e-5)


def test_a_step_moves_one_player():
    """Descending w·v in w = 2 at rate 0.1 with v = 3: w moves to 2 − 0.3, v stays and has no gradient."""
    w, v = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0))
    _fit._descend(w * v, torch.optim.SGD([w], 0.1))
    assert float(w.detach()) == pytest.approx(1.7)
    assert v.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aeot.fit(torch.zeros(5, 2), "diffusion"), "method is 'diffusion'"),
        (lambda: aeot.fit(torch.zeros(5, 1, 9, 8), "gan"), r"shape \(1, 9, 8\) is no image"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_mode_is_refused(model):
    with pytest.raises(ValueError, match="mode is 'smooth'"):
        model.codes(torch.zeros(1, 2), "smooth")


@pytest.fixture
def tiny():
    return runs.SETTINGS["ring"] | {
        "recipe": {"code": 2, "width": 8, "steps": 3, "tol": 0.9},
        "rival_steps": 3,
        "n": 30,
        "samples": 20,
        "methods": ["vae", "gan"],
        "seeds": [0, 1],
    }


def test_rivals_take_steps_of_their_own(tiny, two_blobs):
    def steps(method):
        return runs._fitted(two_blobs, tiny, {"method": method}, torch.Generator().manual_seed(0)).recipe.steps

    tiny["rival_steps"] = 7
    assert (steps("ae-ot"), steps("vae")) == (3, 7)
    del tiny["rival_steps"]
    assert steps("vae") == 3


def test_run_writes_a_part_for_each_method_and_seed(tiny, tmp_path):
    record = records.read(runs.run(tiny, tmp_path))
    assert [(p["seed"], p["method"]) for p in record["final"]["parts"]] == [
        (0, "vae"),
        (0, "gan"),
        (1, "vae"),
        (1, "gan"),
    ]
    assert record["status"] == "complete"


def test_interrupted_run_goes_on(tiny, tmp_path):
    """The first call stops after two parts, the second makes the other two only."""
    seen = []

    def stop(part):
        seen.append(part)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run(tiny, tmp_path, follow=stop)
    again = []
    runs.run(tiny, tmp_path, follow=again.append)
    assert [p["seed"] for p in again] == [1, 1]


def test_missing_record_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m geodesic aeot --data ring"):
        runs.recorded("ring", tmp_path)


def test_sheet_survives_the_record():
    """An 8-bit sheet of two grey images, read back from the base64 of its PNG; corners of the first are black."""
    images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    record = {"final": {"parts": [{"method": "gan", "seed": 0, "sheet": runs._png(images, 0.0, 1.0, 2)}]}}
    page = runs.sheet(record, "gan")
    assert page.shape == (1, 6, 11)  # a pixel of padding around each image
    assert (int(page[0, 1, 1]), int(page[0, 1, 6])) == (0, 255)


def test_metrics_are_called_by_the_ring_run(tiny, tmp_path):
    part = records.read(runs.run(tiny | {"seeds": [0], "methods": ["vae"]}, tmp_path))["final"]["parts"][0]
    assert set(part["scores"]["direct"]) == {*metrics.Coverage.__dataclass_fields__, "memorisation", "cloud"}


def test_command_writes_a_record_and_an_image_grid(tmp_path, capsys):
    """Two methods on the bundled digits: 4 rows of ten 8×8 images each, a pixel around every image."""
    options = ["--methods", "ae-ot", "vae", "--seeds", "0", "--n", "60", "--samples", "32", "--steps", "3"]
    assert __main__.main(["aeot", "--data", "digits", *options, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    record = records.read(path)
    assert record["status"] == "complete"
    assert record["settings"]["recipe"]["steps"] == 3
    assert set(record["final"]["parts"][0]["scores"]["discrete"]) >= {"frechet", "precision", "recall", "nearness"}
    assert decode_image(str(path.with_suffix(".png"))).shape == (1, 2 * (4 * 9 + 1), 10 * 9 + 1)
    said = capsys.readouterr().out
    assert str(path) in said
    assert "ae-ot, singularity-aware: frechet" in said


def test_triples_are_learnt_and_counted(tmp_path):
    """Three bundled digits as channels: AE-OT is scored in each mode, a rival once, and the sheet is in colour."""
    tiny = runs.SETTINGS["stacked"] | {
        "dataset": "digits",
        "recipe": {"code": 3, "width": 8, "steps": 3, "batch": 8, "tol": 0.9},
        "rival_steps": 3,
        "n": 40,
        "samples": 60,
        "methods": ["ae-ot", "gan"],
        "seeds": [0],
    }
    record = records.read(runs.run(tiny, tmp_path))
    ours, gan = record["final"]["parts"]
    assert set(ours["scores"]) == set(aeot.MODES)
    assert set(gan["scores"]["direct"]) == {"modes", "reverse_kl", "sure", "memorisation"}
    assert ours["of_training"]["modes"] <= 40
    assert runs.sheet(record, "gan").shape == (3, 4 * 9 + 1, 10 * 9 + 1)


def test_rows_are_means_over_seeds():
    """Scores 1 and 3 of two seeds: mean 2, deviation √2; the cloud is left out."""
    parts = [{"method": "gan", "seed": k, "scores": {"direct": {"modes": 1 + 2 * k, "cloud": []}}} for k in (0, 1)]
    ((name, scores),) = runs.rows({"final": {"parts": parts}})
    assert (name, list(scores)) == ("gan", ["modes"])
    assert scores["modes"] == (2, pytest.approx(math.sqrt(2)), 2)


def test_points_make_no_page():
    record = {"settings": {"experiment": "ring", "seeds": [0]}, "final": {"parts": [{"method": "gan", "seed": 0}]}}
    with pytest.raises(ValueError, match="the record of 'ring' has no images to show"):
        runs.page(record)


class Reader(torch.nn.Module):
    """Reads a digit off the top left pixel, without doubt."""

    def forward(self, x):
        return 100.0 * torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 10)


def test_triples_of_digits_are_counted():
    """012 twice, 345 once, 999 once of 1000: p = ½, ¼, ¼, so KL = Σ p log(1000 p)."""
    x = torch.tensor([[0, 1, 2], [0, 1, 2], [3, 4, 5], [9, 9, 9]])[:, :, None, None].float()
    found = runs._thousand(x, Reader())
    want = 0.5 * math.log(500) + 0.5 * math.log(250)
    assert found == {"modes": 3, "reverse_kl": pytest.approx(want), "sure": 1.0}
