"""The README states the answer with its numbers; they are those of the records."""

import re
from pathlib import Path
from statistics import fmean

from geodesic import records
from geodesic.verdict import evidence

ROOT = Path(__file__).resolve().parents[1]


def number(found, value, form):
    """Mean of a value over rows, with its deviation where there are several; a dash where it was not measured."""
    if found[0][value] is None:
        return "–"
    (group,) = records.summarise(found, ["network"], value).values()
    return f"{group.mean:{form}}" + (f" ± {group.sd:{form}}" if group.n > 1 else "")


def table():
    """The README's results table, written from results/mnist: mean ± sd over seeds, test points."""
    rows = [
        evidence.row(record) | record["settings"]
        for record in records.load(records.RESULTS / "mnist")
        if (record["settings"]["labels"], record["settings"]["precision"]) == ("true", "bfloat16")
    ]
    lines = [
        "| MNIST, 60,000 images | λ | seeds | LSS | OTS (n = 4,000) | κ | test accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    arms = (
        ("resnet", "none", "ResNet"),
        ("resnet", "batch", "ResNet, batch normalisation"),
        ("plain", "none", "plain"),
        ("radial", "none", "radial scaler (control)"),
    )
    cases = [(arm, *case) for arm in arms for case in ((0, 0.0), (6, 0.0), (6, 0.01))]
    for (network, norm, name), epochs, decay in cases:
        key = {"network": network, "norm": norm, "epochs": epochs, "weight_decay": decay, "status": "ok"}
        found = [row for row in rows if key.items() <= row.items()]
        if not found:
            continue
        plain = network == "plain"
        matched = f" ({number(found, 'lss_permuted', '.2f')})" if plain else ""
        cells = (
            f"{name}, {'trained' if epochs else 'untrained'}",
            f"{decay:g}" if epochs else "–",
            str(len(found)),
            number(found, "lss", ".2f") + matched,
            number(found, "ots", ".3f"),
            number(found, "curl_span_trace_free" if plain else "curl_span", ".2f"),
            number(found, "test_accuracy", ".3f"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paragraph():
    """The README's sentence on CIFAR-10, written from results/cifar10-k1: means over the seeds that there are."""
    recipe = {"network": "resnet", "stages": 1, "norm": "batch", "learning_rate": 1e-3, "schedule": "cosine"}
    recipe |= {"epochs": 30, "labels": "true", "width": None, "n_train": None}
    runs = [r for r in records.load(records.RESULTS / "cifar10-k1") if recipe.items() <= r["settings"].items()]
    found = []
    for decay in (0.0, 0.1):
        here = [run for run in runs if run["settings"]["weight_decay"] == decay]
        stages = [run["final"]["test"]["stages"][0] for run in here]
        assert {stage["ots"][-1]["n"] for stage in stages} == {8000}
        running = fmean(run["epochs"][-1]["running"]["accuracy"] for run in here)
        found.append((len(here), 100 * running, *(fmean(column) for column in zip(
            *((stage["ots"][-1]["share"], stage["lss_mean"]) for stage in stages), strict=True))))  # fmt: skip
    (seeds, *free), (others, *some) = found
    counted = "one seed" if {seeds, others} == {1} else f"{min(seeds, others)} seeds"
    return (
        f"(all images, {counted}), λ = 0.1 takes the ResNet's accuracy while training from {free[0]:.0f} to "
        f"{some[0]:.0f} % and OTS on 8,000 points from {free[1]:.2f} to {some[1]:.2f}, as the paper says it does; "
        f"but LSS *rises*, from {free[2]:.1f} to {some[2]:.1f}."
    )


def test_results_table_is_that_of_the_records():
    """If this fails after new runs, put the table that `python tests/test_readme.py` prints into README.md."""
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_sentence_on_cifar_is_that_of_the_records():
    """As above: `python tests/test_readme.py` prints it."""
    assert paragraph() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_path_of_the_readme_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"(?:book|lib|results|notebooks|benchmarks|tests)/[\w./-]*\w", text))
    assert sorted(path for path in paths - {"book/NAME.md", "notebooks/NAME.ipynb"} if not (ROOT / path).exists()) == []


def test_every_make_target_of_the_readme_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"make ([a-z0-9-]+)", text)) <= targets


if __name__ == "__main__":
    print(table(), paragraph(), sep="\n\n")  # noqa: T201
