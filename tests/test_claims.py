"""The tests of the claims, on synthetic rows in which a claim is true, half true, false, or not testable."""

import math

import pytest
from geodesic import experiment
from geodesic.verdict import claims, evidence, judge
from geodesic.verdict.judge import Part

DECAYS = (0.0, 1e-3, 1e-2, 1e-1, 3e-1)
JITTER = (-1e-3, 0.0, 1e-3)  # what a seed adds to every number


def true_row(network, decay, seed, stages, dataset):
    """A run that does what the paper says, to the letter."""
    plain, past = network == "plain", decay >= 1e-2
    accuracy = 0.5 + 0.4 * past - 0.2 * (decay > 0.1)
    best = {(1, "resnet"): 1e-2, (1, "plain"): 1e-1, (4, "resnet"): 1e-3, (4, "plain"): 3e-1}[stages, network]
    if stages == 4:
        accuracy = 0.995 - 0.02 * (decay != best)
    lss = (8.0 if plain else 3.0) * (0.5 if past else 1.0)
    row = {
        "train_accuracy": accuracy,
        "test_accuracy": accuracy - 0.05 - 0.05 * plain + 0.03 * (decay == best),
        "lss_fall": 0.5,
        "lss": lss,
        "ots": 0.02 if plain else (0.9 if stages == 4 or not past else 0.03),
        "last_share": 0.9 if plain and past else 0.1,
        "noise_kept": 0.5 if plain else 0.9,
        "fgsm_kept": 0.3 if plain else 0.6,
        "pgd_kept": 0.2 if plain else 0.5,
        "variation": 0.0 if plain else -1.0,
        "state_lost": 0.6 if plain else 0.05,
        "branch_lost": None if plain else 0.01,
        "plane_lsr": 1.2 if past else 3.0,
    }
    if dataset == "mnist" and not plain:
        row |= {"ots": 0.99, "lss": 1.05 if decay else 1.5}
    return {key: None if value is None else value + JITTER[seed] for key, value in row.items()}


def rows_of(dataset, stages, make=true_row, seeds=(0, 1, 2), **changes):
    """All λ, both networks, all seeds."""
    base = {
        "dataset": dataset, "copy": False, "tier": "full", "stages": stages, "labels": "true", "epochs": 6,
        "norm": judge.MAIN_NORM[stages], "recipe": "one", "status": "ok", "fingerprint": "f",
    }  # fmt: skip
    return [
        base
        | {"network": network, "weight_decay": decay, "seed": seed}
        | make(network, decay, seed, stages, dataset)
        | changes
        for network in judge.NETWORKS
        for decay in DECAYS
        for seed in seeds
    ]


def everything(make=true_row, **options):
    return [
        row
        for dataset, stages in (("mnist", 1), ("cifar10", 1), ("cifar10", 4))
        for row in rows_of(dataset, stages, make, **options)
    ]


def false_row(network, decay, seed, stages, dataset):
    """A run that does the opposite: networks swapped, λ reversed, LSS rising, everything upside down."""
    other = "plain" if network == "resnet" else "resnet"
    row = true_row(other, DECAYS[len(DECAYS) - 1 - DECAYS.index(decay)], seed, stages, dataset)
    flipped = {"lss_fall": -0.5, "plane_lsr": 3.0 if decay >= 1e-2 else 1.2, "last_share": 0.1}
    kept = {"state_lost": 0.25, "test_accuracy": 0.5, "train_accuracy": 0.5}
    alike = {key: value + JITTER[seed] for key, value in (flipped | kept).items()}
    return row | alike | {"ots": 0.5 - JITTER[seed], "lss": 5.0 + decay}


def by_name(name):
    return next(claim for claim in claims.CLAIMS if claim.name == name)


def first_verdicts(found):
    """Claim → the verdict on its first data set, MNIST or CIFAR-10."""
    return {claim.name: judge.judge(found, claim)[0].verdict for claim in claims.CLAIMS}


def test_every_claim_holds_where_the_paper_is_right():
    assert first_verdicts(everything()) == {claim.name: "holds" for claim in claims.CLAIMS}


def test_no_claim_holds_where_everything_is_upside_down():
    """Break a sign in a test of `claims` and one of these two tests fails."""
    got = first_verdicts(everything(false_row))
    assert got == {claim.name: "does not hold" for claim in claims.CLAIMS}


def test_nothing_is_claimed_without_records():
    for claim in claims.CLAIMS:
        judged = judge.judge([], claim)
        assert {(v.arm.dataset, v.arm.stages) for v in judged} == set(claim.sets)
        assert {v.verdict for v in judged} == {"not run"}


def test_two_seeds_are_not_enough():
    got = first_verdicts(everything(seeds=(0, 1)))
    assert set(got.values()) == {"not run"}


HALVES = {
    "C1": lambda row: {"lss_fall": -0.1} if row["network"] == "plain" else {},
    "C2": lambda row: {"ots": 0.5},
    "C3": lambda row: {"test_accuracy": 0.5},
    "C4": lambda row: {"ots": row["ots"] + 0.5},
    "C5": lambda row: {"train_accuracy": 0.9},
    "C6": lambda row: {"state_lost": row["state_lost"] + 0.2},
    "C7": lambda row: {"variation": 0.0},
    "C8": lambda row: {"last_share": 0.9} if row["weight_decay"] == 0 else {},
    "C9": lambda row: {"plane_lsr": 2.0} if row["network"] == "plain" else {},
    "C10": lambda row: {"test_accuracy": 0.5} if row["stages"] == 4 else {},
}


@pytest.mark.parametrize("name", HALVES)
def test_half_a_claim_holds_in_part(name):
    """One part of each claim is made false, the others are left."""
    found = [row | HALVES[name](row) for row in everything()]
    assert judge.judge(found, by_name(name))[0].verdict == "holds in part"


def test_controls_do_not_count():
    """C2 holds where OTS is 1 before training too; the first control says that it was not earned."""
    found = rows_of("mnist", 1)
    found += [row | {"epochs": 0, "ots": 0.99} for row in found if row["weight_decay"] == 0]
    (verdict,) = judge.judge(found, by_name("C2"))
    assert verdict.verdict == "holds"
    assert [part.outcome for part in verdict.parts if part.control] == ["open", "shown"]


def test_a_network_that_does_nothing_is_no_straight_one():
    """Tracks straight only where accuracy is lost: C2 holds by its words, and the second control refutes them."""
    dead = {"lss": 1.0, "test_accuracy": 0.5}
    found = [
        row | {"lss": 1.5 + JITTER[row["seed"]]} | (dead if row["weight_decay"] == max(DECAYS) else {})
        for row in rows_of("mnist", 1)
    ]
    (verdict,) = judge.judge(found, by_name("C2"))
    assert [part.outcome for part in verdict.parts] == ["shown", "shown", "not run", "refuted"]


def test_interval_is_students():
    """Values 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.30265 (tables), half-width 4.30265/√3."""
    part = Part("x", (1.0, 2.0, 3.0), "above", 0.0)
    half = 4.30265 / math.sqrt(3)
    assert part.interval == pytest.approx((2 - half, 2 + half), rel=1e-5)
    assert part.outcome == "open"  # 2 − 2.48 < 0


@pytest.mark.parametrize(
    ("values", "side", "outcome"),
    [
        ((1.0, 1.1, 1.2), "above", "shown"),
        ((1.0, 1.1, 1.2), "below", "refuted"),
        ((-1.0, -1.1, -1.2), "below", "shown"),
        ((-1.0, -1.1, -1.2), "above", "refuted"),
        ((-1.0, 0.1, 1.2), "above", "open"),
        ((0.0, 0.0, 0.0), "above", "open"),
        ((1.0, 1.0), "above", "not run"),
    ],
)
def test_outcomes(values, side, outcome):
    """The threshold is 0; equality is not beyond it."""
    assert Part("x", values, side, 0.0).outcome == outcome


def test_collapsed_and_diverged_runs_have_no_scores():
    """A collapsed network may look like a perfect geodesic: its LSS does not count, its accuracy does."""
    found = [
        row | ({"lss": 1.0, "status": "collapsed", "train_accuracy": 0.1} if row["weight_decay"] == 3e-1 else {})
        for row in rows_of("cifar10", 1)
    ]
    (arm,) = judge.arms(found, by_name("C3"))
    assert 3e-1 not in arm.cells("resnet", "lss")
    assert arm.cells("resnet", "train_accuracy", collapsed=True)[3e-1] == {0: 0.1, 1: 0.1, 2: 0.1}
    assert judge.judge(found, by_name("C3"))[0].verdict == "holds"


def test_comparisons_are_paired_over_seeds():
    """Seeds differ by far more than the networks: unpaired, nothing could be said."""

    def make(network, decay, seed, stages, dataset):
        row = true_row(network, decay, seed, stages, dataset)
        return row | {"noise_kept": 0.5 + 10 * seed + 0.1 * (network == "resnet") + JITTER[seed] * (network == "plain")}

    (part, *_) = judge.judge(rows_of("cifar10", 1, make), by_name("C7"))[0].parts
    assert part.outcome == "shown"
    assert part.mean == pytest.approx(0.1)


def test_best_lambdas_need_common_ones():
    """K = 1 and K = 4 share λ = 0 and 0.001 only: their best cannot be compared, those of the networks can."""
    kept = {1: (0.0, 1e-3, 1e-2), 4: (0.0, 1e-3, 1e-1, 3e-1)}
    found = [row for row in everything() if row["weight_decay"] in kept[row["stages"]]]
    outcomes = [part.outcome for part in judge.judge(found, by_name("C10"))[0].parts]
    assert outcomes[4:] == ["not run"] * 4
    assert "not run" not in outcomes[:4]


def test_a_lambda_without_enough_seeds_is_left_out():
    found = [row for row in rows_of("cifar10", 1) if row["weight_decay"] != 1e-2 or row["seed"] != 2]
    (arm,) = judge.arms(found, by_name("C4"))
    assert list(arm.cells("resnet", "ots")) == [0.0, 1e-3, 1e-1, 3e-1]


def test_tiers_normalisations_and_recipes_are_not_mixed():
    """The CPU tier and batch normalisation are arms of their own; a stray run of another recipe is left out."""
    found = rows_of("cifar10", 1)
    found += rows_of("cifar10", 1, tier="CPU", recipe="small")
    found += rows_of("cifar10", 1, norm="batch")
    found += [row | {"recipe": "stray"} for row in rows_of("cifar10", 1, seeds=(0,))]
    made = judge.arms(found, by_name("C4"))
    assert [(arm.tier, arm.norm) for arm in made] == [("full", "none"), ("full", "batch"), ("CPU", "none")]
    assert {len(arm.rows) for arm in made} == {2 * len(DECAYS) * 3}


def test_records_of_other_data_are_refused():
    found = rows_of("cifar10", 1)
    found[0]["fingerprint"] = "other"
    with pytest.raises(ValueError, match="records of 2 different data sets"):
        judge.arms(found, by_name("C4"))


def test_rows_read_what_a_run_records():
    """Every number that the tests read is in a record of today's code; the untrained digits ResNet, unscaled."""
    settings = experiment.Settings(epochs=1, batch_size=64, n_train=200, width=16, ots_points=(50,), eval_points=50)
    record = experiment.run(settings)
    row = evidence.row(record)
    assert row.keys() == rows_of("cifar10", 1)[0].keys()
    assert all(value is not None for value in row.values())
    stage = record["final"]["test"]["stages"][0]
    assert row["lss"] == stage["lss_mean"]
    assert row["last_share"] == stage["segment_shares"][-1]
    first, last = (record["epochs"][k]["train"]["stages"][0]["lss_mean"] for k in (0, 1))
    assert row["lss_fall"] == pytest.approx(math.log(first / last))
    assert (row["tier"], row["copy"]) == ("CPU", False)


def test_plane_ratio_of_a_right_angle():
    """Two equal steps at a right angle: length 2 over chord √2; a closed track is left out."""
    tracks = [[[[0, 0], [0, 0]], [[1, 0], [5, 5]], [[1, 1], [0, 0]]]]
    assert evidence._plane_lsr({"stages": [{"tracks": tracks}]}) == pytest.approx(math.sqrt(2))


def test_the_papers_numbers_come_from_its_tables():
    """Table 4: the plain network's LSS runs from 20.2 down to 5.08."""
    assert "plain, LSS: 5.08 … 20.2" in by_name("C3").paper("cifar10", 1)


def test_side_arms_that_cannot_be_judged_are_left_out():
    """One seed with batch normalisation beside a full K = 1 arm: nothing to say of it; three seeds: a row."""
    main = rows_of("cifar10", 1)
    for seeds, norms in (((0,), ["none"]), ((0, 1, 2), ["none", "batch"])):
        judged = judge.judge(main + rows_of("cifar10", 1, norm="batch", seeds=seeds), by_name("C4"))
        assert [v.arm.norm for v in judged if v.arm.rows] == norms


def test_the_overview_has_a_line_for_each_claim_and_a_column_for_each_arm_with_records():
    found = rows_of("cifar10", 1)
    judged = [one for name in ("C2", "C4") for one in judge.judge(found, by_name(name))]
    head, _, mnist_only, cifar = judge.overview(judged).strip().splitlines()
    assert head == "| claim | CIFAR-10, K = 1, full tier |"
    assert mnist_only.startswith("| [C2](#verdict-c2): ")
    assert mnist_only.endswith(" |  |")
    wanted = next(one.verdict for one in judged if one.arm.rows)
    assert cifar.endswith(f" | {wanted} |")


def test_the_table_has_a_line_for_each_arm_and_one_for_all_that_is_missing():
    judged = judge.judge(rows_of("cifar10", 1, copy=True), by_name("C1"))
    lines = judge.table(judged).strip().splitlines()[2:]
    assert len(lines) == 2
    assert "**holds**" in lines[0]
    assert "CIFAR-10 (JPEG copy), K = 1, full tier" in lines[0]
    assert "resnet: ln(LSS before / after training), λ > 0: 0.5 ± 0.001 (n = 3)" in lines[0]
    assert "**not run**" in lines[1]
    assert by_name("C1").says in lines[0]
    assert by_name("C1").says not in lines[1]
    assert "MNIST with K = 1; CIFAR-100 with K = 1; CIFAR-10 with K = 4; CIFAR-100 with K = 4" in lines[1]
    assert judge.not_run(judged).startswith("MNIST with K = 1 (C1); ")


def test_details_show_interval_and_outcome():
    """Values 0.499, 0.5, 0.501: half-width 2.484 × 0.001."""
    text = judge.details(judge.judge(rows_of("cifar10", 1), by_name("C1"))[0])
    assert "| > 0.0488 | 0.5 ± 0.001 (n = 3) | 0.498 … 0.502 | 3 | shown |" in text
    assert "(control)" in text


def test_details_name_the_tests_without_seeds_in_one_line():
    shown = judge.judge(rows_of("cifar10", 1), by_name("C1"))[0]
    few = [judge.Part(what, (1.0,), "above", 0.0) for what in ("a fall", "a rise")]
    text = judge.details(shown._replace(parts=(*shown.parts, *few)))
    assert text.endswith("|\n\nNot run (fewer than 3 seeds): a fall; a rise.\n")
    assert "Not run" not in judge.details(shown)
    assert "|" not in judge.details(shown._replace(parts=tuple(few)))
