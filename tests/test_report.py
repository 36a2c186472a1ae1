"""Tables of records: means, deviations, and the paper's numbers beside ours."""

import csv
import io

import geodesic
import pytest
from geodesic import experiment, records, report
from geodesic.__main__ import main

DECAYS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def write(folder, lss=2.0, accuracy=0.5, stages=1, status="ok", **settings):
    """A record in the shape that experiment.run writes, with numbers that a test chooses."""
    values = experiment.Settings(stages=stages, **settings).to_dict()
    lss = lss if isinstance(lss, list) else [lss]
    parts = [
        {"lss_mean": one, "lsr_mean": 1.5, "segment_shares": [0.25, 0.75], "ots": [{"share": 1.0, "n": 360}]}
        for one in lss
    ]
    part = {"accuracy": accuracy, "loss": 0.5, "stages": parts}
    final = None if status == "diverged" else {"train": part, "test": part}
    provenance = {"seconds": 3.0, "device": "cpu", "geodesic": geodesic.__version__}
    records.write({"settings": values, "status": status, "final": final, "provenance": provenance}, folder)


def test_scores_are_means_over_seeds_with_their_deviation(tmp_path):
    """1, 2, 3 have mean 2 and sample deviation 1; settings that do not vary make no column."""
    for seed, lss in enumerate((1.0, 2.0, 3.0)):
        write(tmp_path, lss, seed=seed, network="plain")
        write(tmp_path, 5.0, seed=seed, network="resnet")
    table = report.table(report.rows(tmp_path))
    assert table.keys == ("network", "runs")
    assert [row["lss_mean"] for row in table.rows] == [(2.0, 1.0, 3), (5.0, 0.0, 3)]
    assert table.notes == ("OTS on 360 points",)


def test_runs_that_did_not_end_well_are_counted_in_a_column(tmp_path):
    write(tmp_path, seed=0)
    write(tmp_path, seed=1, status="diverged")
    (row,) = report.table(report.rows(tmp_path)).rows
    assert (row["runs"], row["diverged"], row["lss_mean"]) == (2, 1, (2.0, 0.0, 1))


def test_groups_are_those_asked_for_and_in_order(tmp_path):
    """None before numbers, numbers by size; λ is averaged over, as it was not asked for."""
    for width in (None, 16, 9):
        for decay in (0.1, 0.2):
            write(tmp_path, 10 * decay, width=width, weight_decay=decay)
    table = report.table(report.rows(tmp_path), by=["width"])
    assert [row["width"] for row in table.rows] == [None, 9, 16]
    assert [row["lss_mean"].mean for row in table.rows] == [pytest.approx(1.5)] * 3


def test_several_stages_are_averaged_and_said_to_be(tmp_path):
    write(tmp_path, [1.0, 2.0, 3.0, 6.0], stages=4, dataset="cifar10")
    table = report.table(report.rows(tmp_path))
    assert table.rows[0]["lss_mean"].mean == 3.0
    assert "scores are means over the stages" in table.notes


def test_records_of_other_notebooks_show_what_they_displayed(tmp_path):
    for seed, value in ((0, 1), (1, 4)):
        settings = {"notebook": "mine", "seed": seed, "width": 3}
        provenance = {"seconds": 2.0, "geodesic": geodesic.__version__}
        record = {"settings": settings, "status": "ok", "final": {"value": value}, "provenance": provenance}
        records.write(record, tmp_path)
    (row,) = report.table(report.rows(tmp_path), scores=["value"]).rows
    assert row["value"].mean == 2.5
    assert row["runs"] == 2


def test_csv_has_full_precision_and_no_deviation_of_one_run(tmp_path):
    write(tmp_path, 1 / 3)
    text = report.render(report.table(report.rows(tmp_path), scores=["lss_mean"]), "csv")
    (row,) = csv.DictReader(io.StringIO(text))
    assert float(row["lss_mean"]) == 1 / 3
    assert row["lss_mean sd"] == ""
    assert row["lss_mean n"] == "1"


def test_markdown_and_terminal_show_the_same_cells(tmp_path):
    for seed, lss in enumerate((1.0, 2.0)):
        write(tmp_path, lss, seed=seed)
    table = report.table(report.rows(tmp_path), scores=["lss_mean"])
    assert report.render(table, "markdown") == "| runs | lss_mean |\n| --- | --- |\n| 2 | 1.5 ± 0.7 |\n"
    assert report.render(table) == "runs  lss_mean\n2     1.5 ± 0.7\n"


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [
        (97.1834, 0.1312, "97.2 ± 0.1"),
        (97.1834, 0.0968, "97.2 ± 0.1"),
        (0.5, 0.0034, "0.500 ± 0.003"),
        (1234.5, 37.0, "1234 ± 37"),
        (3.5e-9, 4e-10, "3.5e-09 ± 4e-10"),
        (1 / 3, 0.0, "0.3333 ± 0"),
        (1.0, 3e-11, "1 ± 0"),
    ],
)
def test_a_mean_has_the_decimals_that_its_deviation_justifies(mean, sd, text):
    """Both end where the deviation's first digit stands, after rounding; whole numbers are not rounded further."""
    assert report._text(records.Summary(mean, sd, 3)) == text
    assert report._text(records.Summary(mean, sd, 1)) == f"{mean:.4g}"


def test_the_paper_stands_beside_as_many_decays_in_ascending_order(tmp_path):
    """Table 4 of the paper, ResNet: LSS 3.79 at its first λ and 3.15 at its ninth; accuracies are shares here."""
    for decay in DECAYS:
        write(tmp_path, 1 + decay, dataset="cifar10", network="resnet", weight_decay=decay)
    table = report.compare(report.rows(tmp_path))
    first, last = table.rows[0], table.rows[-1]
    assert (first["weight_decay"], first["lss_mean"].mean, first["paper lss_mean"].mean) == (0.0, 1.0, 3.79)
    assert (last["weight_decay"], last["lss_mean"].mean, last["paper lss_mean"].mean) == (0.3, 1.3, 3.15)
    assert first["paper test_accuracy"].mean == pytest.approx(0.663)


def test_with_other_decays_the_paper_stands_beside_zero_only(tmp_path):
    for decay in (0.0, 0.1):
        write(tmp_path, dataset="cifar10", network="resnet", weight_decay=decay)
    first, second = report.compare(report.rows(tmp_path)).rows
    assert first["paper lss_mean"].mean == 3.79
    assert second["paper lss_mean"] is None


def test_an_image_folder_is_compared_as_a_copy_of_what_it_is_named_after(tmp_path):
    """Both are set beside Table 4, in lines of their own, and a note says which is the copy."""
    write(tmp_path, 1.0, dataset="cifar10", network="resnet")
    assert len(report.compare(report.rows(tmp_path)).notes) == 1
    write(tmp_path, 2.0, dataset="folder:cifar10", network="resnet")
    table = report.compare(report.rows(tmp_path))
    assert [(row["dataset"], row["lss_mean"].mean) for row in table.rows] == [("cifar10", 1.0), ("folder:cifar10", 2.0)]
    assert [row["paper lss_mean"].mean for row in table.rows] == [3.79, 3.79]
    assert table.notes[1] == "folder:cifar10 is taken for a copy of cifar10: the images may differ"


def test_collapsed_runs_are_counted_beside_the_paper_too(tmp_path):
    write(tmp_path, dataset="cifar10", seed=0)
    assert "collapsed" not in report.compare(report.rows(tmp_path)).keys
    write(tmp_path, dataset="cifar10", seed=1, status="collapsed")
    table = report.compare(report.rows(tmp_path))
    assert table.keys[-2:] == ("runs", "collapsed")
    assert (table.rows[0]["runs"], table.rows[0]["collapsed"]) == (2, 1)


def test_controls_are_not_compared(tmp_path):
    """An untrained network has λ = 0 too, and must not stand beside the paper's trained one."""
    write(tmp_path, 9.0, dataset="cifar10", epochs=0)
    write(tmp_path, 2.0, dataset="cifar10")
    write(tmp_path, 8.0, dataset="cifar10", labels="shuffled")
    (row,) = report.compare(report.rows(tmp_path)).rows
    assert row["lss_mean"].mean == 2.0


def test_shares_of_segments_are_compared_when_asked_for(tmp_path):
    """Table 3 of the paper: 0.264 of the ResNet's track lies in the first of ten segments at λ = 0."""
    write(tmp_path, dataset="cifar100", network="resnet")
    (row,) = report.compare(report.rows(tmp_path), ["segment_share_1"]).rows
    assert row["segment_share_1"].mean == 0.25
    assert row["paper segment_share_1"].mean == 0.264


def test_the_papers_tables_are_whole():
    """Nine λ at one stage and five at four; deviations are given at four stages only."""
    paper = report.paper_values()
    assert set(paper) == {(f"cifar{c}", k, net) for c in (10, 100) for k in (1, 4) for net in ("plain", "resnet")}
    for (_, stages, _), values in paper.items():
        assert len(values["lss_mean"]) == (9 if stages == 1 else 5)
        assert {value.n for value in values["lss_mean"].values()} == {1 if stages == 1 else 2}
        assert all(0 <= value.mean <= 1 for value in values["test_accuracy"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "netwrok"], "unknown column netwrok; did you mean network?"),
        (["--scores", "lss"], "unknown column lss; did you mean"),
        (["--compare", "paper"], "the paper has no table for these records; it has: cifar10 with stages=1"),
        (["--compare", "paper", "--scores", "lss"], "unknown column lss"),
    ],
)
def test_a_wrong_question_is_answered_in_one_line(tmp_path, capsys, arguments, message):
    write(tmp_path, seed=0)
    assert main(["report", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_empty_or_missing_folder_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no records there" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_the_command_prints_the_table(tmp_path, capsys):
    write(tmp_path, seed=0)
    assert main(["report", str(tmp_path), "--scores", "lss-mean", "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("runs,lss_mean,lss_mean sd,lss_mean n\n1,2.0,,1\n")
