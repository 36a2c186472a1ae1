"""The measuring path: one streamed pass, gauges of plain networks, and what the record of a finished run holds."""

import json

import pytest
import torch
from geodesic import data, measure, networks, probes, tracks, transport
from geodesic.settings import Settings
from PIL import Image


def digits(train=200, test=90):
    return data.load("digits").take(train, test)


def settings(**changes):
    return Settings(**{"ots_points": (30, 60), "eval_points": 50, "width": 16} | changes)


@pytest.fixture(params=[("resnet", "none"), ("resnet", "batch"), ("plain", "none"), ("plain", "batch")], ids="-".join)
def network(request, generator):
    kind, norm = request.param
    net = networks.build(kind, "digits", norm=norm, width=16, generator=generator)
    with torch.no_grad():
        for _ in range(20 if norm == "batch" else 0):  # running means of the data, as after training
            net.train()(digits().x_train)
    return net.eval()


def test_convolutional_stages_are_scored_one_by_one(monkeypatch, generator):
    """In batches that hold so many numbers of the largest state, at least one point; the scores do not depend on it."""
    net = networks.build("resnet", "folder:images", 4, depth=2, width=4, in_shape=(3, 8, 8), classes=5)
    x, y = torch.randn(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])
    found, whole = [], net.states
    for numbers, batch in ((1, 1), (4 * 8 * 8 * 4, 4), (1 << 20, 1 << 12)):
        monkeypatch.setitem(measure._SCORED, "cpu", numbers)
        assert measure.score_batch(net) == batch
        sizes = []
        monkeypatch.setattr(net, "states", lambda x, sizes=sizes: sizes.append(len(x)) or whole(x))
        found.append(measure.evaluate(net, x, y))
        assert sizes == [len(part) for part in x.split(batch)]
    assert len(found[0]["stages"]) == 4
    assert found[0]["early_exit"] == found[1]["early_exit"] == found[2]["early_exit"]
    for one in found[1:]:
        for a, b in zip(found[0]["stages"], one["stages"], strict=True):
            assert a["lss_mean"] == pytest.approx(b["lss_mean"], rel=1e-5)
            assert a["segment_shares"] == pytest.approx(b["segment_shares"], rel=1e-5)


def test_a_pass_scores_the_first_points_and_answers_for_all(network, monkeypatch):
    """Batches of 32 that the number of points scored cuts; the tracks that are kept are the network's own."""
    monkeypatch.setitem(measure._SCORED, "cpu", 32 * 16)
    dataset = digits()
    x, y = dataset.x_train, dataset.y_train
    seen = measure._Pass(network, x, y, scored=75, keep=[10, 50])
    found, scored = seen.found, measure.evaluate(network, x[:75], y[:75])
    whole = measure.evaluate(network, x, y)
    assert (found["accuracy"], found["stages"][0]["n"]) == (whole["accuracy"], 75)
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert found["early_exit"] == scored["early_exit"]
    assert found["stages"][0]["lss_mean"] == pytest.approx(scored["stages"][0]["lss_mean"], rel=1e-6)
    with torch.no_grad():
        (track,) = network.tracks(x)
    torch.testing.assert_close(seen.paths[0], track[:, :75])
    torch.testing.assert_close(seen.ends[0], track[[0, -1], :75])
    assert measure._Pass(network, x, y, scored=75, keep=[150]).scored == 150  # all of a subset is scored


def test_the_record_of_a_run_holds_what_its_network_is_asked(network):
    dataset = digits()
    found = measure.final(network, dataset, settings())
    (stage,), (fitted,) = found["test"]["stages"], found["train"]["stages"]
    assert [score["n"] for score in stage["ots"]] == [score["n"] for score in fitted["ots"]] == [30, 60]
    assert set(stage["curl"]["map"]) == set(stage["curl"]["blocks"]) == {"isotropic", "span"}
    eliminated = found["test"]["robustness"]["elimination"]
    assert [len(eliminated[what]) for what in ("copied", "zeroed")] == [5, 3]
    with torch.no_grad():
        (track,), (fit,) = network.tracks(dataset.x_test), network.tracks(dataset.x_train)
    if network.network == "plain":
        assert stage["aligned"].keys() == {*tracks.GAUGES, "ots"}
        for name, gauge in tracks.find_gauges(fit).items():
            want = tracks.line_shape_score(gauge.apply(track)).mean().item()
            assert stage["aligned"][name]["lss_mean"] == pytest.approx(want, rel=1e-5)
        assert stage["aligned"]["ots"]["n"] == 60
        assert len(eliminated["aligned"]) == 5
        assert "ots_unit" not in stage
    else:
        assert stage["growth"] == pytest.approx(tracks.growth(track).item(), rel=1e-5)
        factors = tracks.unit_channels(track[0, :90])
        score = transport.optimal_transport_score(factors * track[0, :60], factors * track[-1, :60])
        assert (stage["ots_unit"][1]["share"], stage["ots_unit"][1]["n"]) == (score.share, 60)
        assert stage["ots_unit"][1]["cost_ratio"] == pytest.approx(score.cost_ratio, rel=1e-5)
        assert eliminated["aligned"] is None
        assert "aligned" not in stage


def test_the_training_part_is_scored_on_its_first_points(generator, monkeypatch):
    """Loss and accuracy take all; a size that only the training part has is not cut."""
    net, dataset = networks.build("resnet", "digits", width=16, generator=generator), digits(200, 90)
    monkeypatch.setattr(measure, "TRAIN_POINTS", 70)
    monkeypatch.setattr(measure, "TRAIN_OTS", 40)
    found = measure.final(net, dataset, settings(ots_points=(30, 60)))
    assert (found["train"]["stages"][0]["n"], found["test"]["stages"][0]["n"]) == (70, 90)
    assert [[o["n"] for o in found[part]["stages"][0]["ots"]] for part in ("train", "test")] == [[30], [30, 60]]
    assert found["train"]["accuracy"] == measure.evaluate(net, dataset.x_train, dataset.y_train)["accuracy"]
    found = measure.final(net, dataset, settings(ots_points=(30, 200)))
    assert [[o["n"] for o in found[part]["stages"][0]["ots"]] for part in ("train", "test")] == [[30, 200], [30]]


def test_the_record_repeats_and_the_network_stays_as_it_was(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = measure.final(network, digits(), settings())
    assert measure.final(network, digits(), settings()) == first
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_the_gauge_undoes_itself_and_leaves_the_chain_of_blocks_as_it_is(generator):
    """x_l → gauge → x_l; the blocks seen from gauge to gauge take x_0 to x_L in it. Convolutional states."""
    net = networks.build("plain", "cifar10", depth=3, width=4, generator=generator).eval()
    x = torch.randn(20, 3, 32, 32, generator=generator)
    with torch.no_grad():
        (track,) = net.tracks(x)
        aligned = measure.Aligned(track)
        state = aligned.state(0, track[0])
        for l, block in enumerate(aligned.seen(net.stages[0].blocks), 1):
            torch.testing.assert_close(aligned.back(l, aligned.state(l, track[l])), track[l])
            state = block(state)
            torch.testing.assert_close(state, aligned.state(l, track[l]), rtol=1e-4, atol=1e-6)
    want = aligned._gauges["permuted"].apply(track)
    torch.testing.assert_close(state, want[-1], rtol=1e-4, atol=1e-6)


def shuffling_network(generator):
    """A plain network whose blocks do nothing but give the units other places and another size."""
    net = networks.build("plain", "digits", width=12, depth=3, generator=generator).eval()
    with torch.no_grad():
        net.stages[0].entry[1].weight.abs_()
        for block in net.stages[0].blocks:
            block.layer1.weight.copy_(torch.eye(12))
            block.layer2.weight.copy_(1.5 * torch.eye(12)[torch.randperm(12, generator=generator)])
    return net


def test_a_plain_network_that_shuffles_its_units_is_straight_and_indestructible_once_aligned(generator):
    """Its labels alone are crooked: LSS and the accuracy with copied units are bad as they stand, aligned perfect."""
    net, dataset = shuffling_network(generator), digits()
    least = dataset.x_train.min()
    positive = {"x_train": dataset.x_train - least, "x_test": dataset.x_test - least}
    y = {part: net(positive[f"x_{part}"]).argmax(1) for part in ("train", "test")}
    own = data.Dataset("own", **positive, y_train=y["train"], y_test=y["test"], classes=dataset.classes,
                       fingerprint="", source="")  # fmt: skip
    found = measure.final(net, own, settings(width=12, depth=3))["test"]
    (stage,), eliminated = found["stages"], found["robustness"]["elimination"]
    assert stage["aligned"]["norm1"]["lss_mean"] > 1.3
    assert stage["aligned"]["permuted"]["lss_mean"] is None  # the aligned track does not move
    assert stage["aligned"]["ots"]["share"] == 1
    assert eliminated["aligned"] == [[1.0] * 5] * 3
    assert min(map(min, eliminated["copied"])) < 0.9


def test_a_collapsed_plain_network_is_measured(generator):
    """All states alike: no direction of the data is left, and nothing raises."""
    net = networks.build("plain", "digits", width=16, generator=generator)
    with torch.no_grad():
        for block in net.stages[0].blocks:
            block.layer1.weight.zero_()
            block.layer2.bias.normal_(generator=generator)
    (stage,) = measure.final(net, digits(), settings())["test"]["stages"]
    assert stage["curl"]["map"].keys() == {"isotropic"}
    assert stage["curl"]["map"]["isotropic"]["share"] == 0  # J = 0: the displacement −x is a gradient


def test_curl_of_a_plain_network_is_that_of_its_permuted_gauge(generator):
    """One block that permutes: its Jacobian is a permutation matrix as it stands, the identity in the gauge."""
    net, dataset = shuffling_network(generator), digits()
    x = dataset.x_test - dataset.x_test.min()
    with torch.no_grad():
        (track,) = net.tracks(x)
    blocks, aligned = net.stages[0].blocks, measure.Aligned(track)
    raw = measure._curl(blocks, track[0])["map"]["isotropic"]
    seen = measure._curl(aligned.seen(blocks), aligned.state(0, track[0]))["map"]["isotropic"]
    assert raw["share"] > 0.1
    assert seen["size"] < 1e-3 < raw["size"]


def test_rounding_spares_certificates_and_whole_numbers():
    found = {
        "n": 123456789,
        "share": 0.123456789,
        "w2_squared": 0.123456789,
        "rows": [(1.00000049, None, "1.23456789")],
    }
    want = {"n": 123456789, "share": 0.12346, "w2_squared": 0.123456789, "rows": [[1.0, None, "1.23456789"]]}
    assert measure.rounded(found) == want
    assert measure.rounded({"loss": float("inf")}) == {"loss": float("inf")}


def test_what_a_record_holds_of_an_epoch(network):
    dataset = digits()
    found = measure.evaluate(network, dataset.x_test, dataset.y_test)
    got = measure.brief(found)
    assert got.keys() == {"loss", "accuracy", "stages"}
    assert got["stages"] == [{key: found["stages"][0][key] for key in ("lsr_mean", "lss_mean")}]


def test_class_pairs_are_tabulated_for_few_classes_alone(generator, monkeypatch):
    net = networks.build("resnet", "digits", width=16, generator=generator)
    assert len(measure.final(net, digits(), settings())["test"]["stages"][0]["theorem1"]["by_class"]) == 10
    monkeypatch.setattr(measure, "_PAIR_CLASSES", 9)
    assert measure.final(net, digits(), settings())["test"]["stages"][0]["theorem1"]["by_class"] is None


@pytest.mark.parametrize("kind", ["resnet", "plain"])
def test_a_folder_of_images_with_four_stages(kind, tmp_path, generator):
    """From files to a record that JSON can say, five classes of 16 × 16 pixels; small."""
    for part, count in (("train", 12), ("test", 8)):
        for label in "abcde":
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{k}.png")
    dataset = data.load(f"folder:{tmp_path}")
    net = networks.build(
        kind, dataset.name, 4, norm="batch", depth=2, width=4, in_shape=(3, 16, 16), classes=5, generator=generator
    )
    found = measure.rounded(measure.final(net, dataset, settings(ots_points=(20, 40), width=4)))
    assert len(json.dumps(found, allow_nan=False)) < 20_000
    assert len(found["test"]["stages"]) == 4
    assert len(found["test"]["robustness"]["elimination"]["copied"]) == 8


def test_one_step_of_kept_tracks_is_that_of_the_network(network):
    dataset = digits()
    x, y = dataset.x_test, dataset.y_test
    with torch.no_grad():
        errors, accuracy = probes.one_step(network, network.states(x), y)
    found = measure.final(network, dataset, settings())["test"]
    assert found["one_step_accuracy"] == accuracy
    assert found["stages"][0]["one_step_error"] == pytest.approx(errors[0], rel=1e-5)
