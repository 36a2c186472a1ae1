"""One call scores any model beside its controls, and says what the scores do not mean."""

import json
import math

import pytest
import torch
import torchvision
from geodesic import data, measure, networks, probes, tracks, transport
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


@pytest.fixture(scope="module")
def images():
    return torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def report(resnet, images):
    loader = DataLoader(TensorDataset(images, torch.zeros(40)), batch_size=16)
    make = lambda: torchvision.models.resnet18(num_classes=10)  # noqa: E731
    torch.manual_seed(1)
    return measure.score(resnet, loader, ots_points=(20, 30), controls=measure.CONTROLS, untrained=make)


def row(report, stage, subject):
    (found,) = (row for row in report.rows if (row["stage"], row["subject"]) == (stage, subject))
    return found


def test_a_resnet_is_scored_as_by_hand(resnet, images, report):
    with torch.no_grad():
        net = resnet.eval()
        states = [net.maxpool(net.relu(net.bn1(net.conv1(images))))]
        for block in net.layer1:
            states.append(block(states[-1]))
    track = torch.stack(states)
    found = row(report, 1, "model")
    assert (found["n"], found["blocks"], [score["n"] for score in found["ots"]]) == (40, 2, [20, 30])
    assert found["lsr_mean"] == pytest.approx(tracks.line_shape_ratio(track).mean().item(), rel=1e-5)
    assert found["lss_mean"] == pytest.approx(tracks.line_shape_score(track).mean().item(), rel=1e-5)
    assert found["action"] == pytest.approx(tracks.action(track).item(), rel=1e-5)
    want = transport.optimal_transport_score(track[0, :30], track[-1, :30])
    assert (found["ots"][1]["share"], found["ots"][1]["certified"]) == (want.share, True)
    chain = lambda x: resnet.layer1(x.clone())  # noqa: E731
    kappa = probes.curl_share(chain, track[0, :16], 16, torch.Generator().manual_seed(5), psd_points=0)
    assert found["curl_share"] == pytest.approx(kappa.share, abs=4 * kappa.standard_error + 0.02)
    assert 0 < found["curl_share"] < found["curl_chance"] < 0.5


def test_every_score_stands_beside_its_controls(report):
    subjects = [("model", "untrained", "scattered", "radial")] * 4
    assert [tuple(r["subject"] for r in report.rows if r["stage"] == k) for k in range(1, 5)] == subjects
    model, radial, scattered = (row(report, 1, name) for name in ("model", "radial", "scattered"))
    assert (radial["lss_mean"], radial["lsr_mean"], radial["curl_share"]) == (pytest.approx(1), pytest.approx(1), 0)
    assert (radial["ots"][-1]["share"], radial["ots"][-1]["cost_ratio"]) == (1, pytest.approx(1))
    assert scattered["action"] == pytest.approx(model["action"], rel=1e-4)  # the same steps, other directions
    assert scattered["lss_mean"] == pytest.approx(math.sqrt(2), rel=0.02)  # of two that are nearly orthogonal
    assert row(report, 1, "untrained")["lss_mean"] != model["lss_mean"]
    assert all(row(report, k, "model")["lss_mean"] is None for k in (2, 3, 4))
    assert sum("One block: every track is straight" in note for note in report.notes) == 3
    (said,) = (note for note in report.notes if "'scattered'" in note)
    assert "OTS (stage 1, 2, 3, 4)" in said


def test_a_report_is_a_table_a_page_and_plain_values(report):
    frame = report.frame()
    assert {"stage", "subject", "n", "lsr_mean", "lss_mean", "ots_share", "ots_n", "curl_share"} <= set(frame.columns)
    assert len(frame) == len(report.rows) == 16
    assert frame["ots_n"].unique().tolist() == [30]
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["ots"][0]["n"] == 20
    text, page = str(report).splitlines(), report._repr_html_()
    assert text[0].split() == ["stage", "subject", "blocks", "n", "lsr_mean", "lss_mean", "ots_share", "ots_n",
                               "curl_share"]  # fmt: skip
    assert text[1].split()[:4] == ["1", "model", "2", "40"]
    assert page.count("<tr>") == 17
    assert "<caption>" in page
    assert "&#x27;scattered&#x27;" in page


def test_the_model_is_left_as_it_was_and_the_report_repeats(resnet, images):
    resnet.train()
    before, state = {k: v.clone() for k, v in resnet.state_dict().items()}, torch.get_rng_state()
    first = measure.score(resnet, images, ots_points=(10,))
    assert measure.score(resnet, [images[:7], images[7:]], ots_points=(10,)).rows[0]["lss_mean"] == pytest.approx(
        first.rows[0]["lss_mean"], rel=1e-5
    )
    assert measure.score(resnet, images, ots_points=(10,)).to_dict() == first.to_dict()
    assert all(m.training for m in resnet.modules())
    assert all(torch.equal(v, before[k]) for k, v in resnet.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in resnet.modules())


def shuffling(generator):
    """A plain stack whose blocks give the channels other places and another size, and do nothing else."""
    blocks = [nn.Conv2d(12, 12, 1, bias=False) for _ in range(3)]
    for block in blocks:
        block.weight.data = 1.5 * torch.eye(12)[torch.randperm(12, generator=generator)].view(12, 12, 1, 1)
    return nn.Sequential(nn.Sequential(*[nn.Sequential(b, nn.ReLU()) for b in blocks]), nn.Flatten())


def test_a_plain_stack_is_scored_raw_and_aligned_with_a_line_that_says_why(generator):
    """Aligned, blocks that shuffle channels do not move at all; raw, they are crooked."""
    x = torch.rand(60, 12, 4, 4, generator=generator)
    report = measure.score(shuffling(generator), x, "0.*", ots_points=(30,))
    raw, aligned = row(report, 1, "model"), row(report, 1, "model, aligned")
    assert raw["lss_mean"] > 1.3
    assert raw["ots"][0]["share"] < 1
    assert raw["curl_share"] is None
    assert aligned["lss_mean"] is None  # no point moves
    assert (aligned["ots"][0]["share"], aligned["n"]) == (1, 30)
    assert aligned["curl_size"] < 1e-3
    assert "no common name from block to block" in report.notes[0]
    residual = measure.score(torchvision.models.resnet18(num_classes=2), x[:, :3], ots_points=(10,), controls=())
    assert {r["subject"] for r in residual.rows} == {"model"}
    assert not any("common name" in note for note in residual.notes)


@pytest.mark.parametrize("kind", networks.NETWORKS)
def test_our_networks_score_as_they_do_in_a_record(kind, generator):
    dataset = data.load("digits").take(50, 90)
    net = networks.build(kind, "digits", width=16, generator=generator)
    want = measure.evaluate(net, dataset.x_test, dataset.y_test)["stages"][0]
    report = measure.score(net, dataset.x_test, ots_points=(50,))
    found = row(report, 1, "model")
    for key, value in want.items():
        assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert ("model, aligned" in {r["subject"] for r in report.rows}) == (kind == "plain")
    if kind == "radial":
        assert found["lss_mean"] == pytest.approx(1)
        assert found["curl_share"] == pytest.approx(0, abs=1e-6)


def test_attention_has_a_curl_share_where_blocks_are_maps(generator):
    """With fused kernels it had none; where only one token is the state, a line says why there is none."""
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 8, 3, 2, 16, 32)
    x = torch.randn(20, 3, 16, 16, generator=generator)
    blocks = "encoder.layers.*"
    whole = measure.score(vit, x, blocks, ots_points=(20,))
    assert 0 < row(whole, 1, "model")["curl_share"] < 0.5
    token = measure.score(vit, x, blocks, "first", ots_points=(20,))
    assert row(token, 1, "model")["curl_share"] is None
    assert "Stage 1: κ was not measured (with view='first' a block is no map of its states)." in token.notes
    every = measure.score(vit, x, blocks, "all", ots_points=(20, 80))
    assert (row(every, 1, "model")["n"], row(every, 1, "model")["ots"][-1]["n"]) == (100, 80)
    batches = [{"x": x[:8], "labels": torch.zeros(8)}, {"x": x[8:], "labels": torch.zeros(12)}]
    assert measure.score(vit, batches, blocks, ots_points=(20,)).rows[0]["lss_mean"] == pytest.approx(
        whole.rows[0]["lss_mean"], rel=1e-5
    )


def test_ots_takes_the_sizes_that_there_are_points_for(resnet, images):
    found = measure.score(resnet, images[:15], ots_points=(10, 1000), controls=()).rows[0]
    assert [score["n"] for score in found["ots"]] == [10]
    found = measure.score(resnet, images[:15], controls=()).rows[0]
    assert [score["n"] for score in found["ots"]] == [15]


def test_bad_input_is_said_in_a_line(resnet, images):
    for options, said in (
        ({"controls": ("shuffled",)}, "control 'shuffled' is unknown; there are: untrained, scattered, radial"),
        ({"controls": ("untrained",)}, "pass untrained=, a function that makes one"),
        ({"controls": ("untrained",), "untrained": lambda: resnet, "loader": iter([images])}, "begin again"),
        ({"ots_points": (1,)}, "must be sizes of at least 2"),
        ({"loader": []}, "the loader is empty"),
        ({"loader": [images, images.new_full((2, 3, 32, 32), torch.nan)]}, "the input of block layer1.0 being the"),
        (
            {"controls": ("untrained",), "untrained": lambda: torchvision.models.resnet34(num_classes=2)},
            "other stages than the model",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            measure.score(resnet, **({"loader": images[:4]} | options))


def test_a_pass_without_points_is_refused(resnet):
    with pytest.raises(ValueError, match="no batch of points"):
        measure.measure(measure.watch(resnet), [], measure.Straightness())


def test_meters_that_keep_tracks_say_what_the_whole_says(generator):
    """In one pass of batches: OTS and collapse of the ends, Theorem 1 of whole tracks, by class and without."""
    dataset = data.load("digits").take(50, 90)
    net = networks.build("resnet", "digits", width=16, generator=generator).eval()
    x, y = dataset.x_test, dataset.y_test
    with torch.no_grad():
        (track,) = net.tracks(x)
    batches = list(zip(x.split(32), y.split(32), strict=True))
    found = measure.measure(net, batches, measure.Answers(), measure.Ends((20, 80), 10), measure.Paths(70, 10))
    (stage,) = found["stages"]
    assert [score["share"] for score in stage["ots"]] == [
        transport.optimal_transport_score(track[0, :n], track[-1, :n]).share for n in (20, 80)
    ]
    assert stage["collapse"] == pytest.approx(probes.collapse(track[-1, :80], y[:80], 10), rel=1e-5)
    want = probes.theorem1_violations(track[:, :70], y[:70], 10)
    assert stage["theorem1"]["pairs"] == want["pairs"] == 70 * 69 // 2
    assert stage["theorem1"]["violated"] == pytest.approx(want["violated"])
    assert found["accuracy"] == measure.evaluate(net, x, y)["accuracy"]
    (bare,) = measure.measure(net, [(x, None)], measure.Paths(70))["stages"]
    assert (bare["theorem1"]["violated"], bare["theorem1"]["between"]) == (pytest.approx(want["violated"]), None)
