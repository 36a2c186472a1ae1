"""The README states the answer with its numbers; they are those of the records."""

import re
from pathlib import Path

from geodesic import records

ROOT = Path(__file__).resolve().parents[1]


def table():
    """The README's results table, written from results/mnist: mean ± sd over seeds, test points."""
    rows = [
        row
        for row in records.rows(records.RESULTS / "mnist")
        if (row["norm"], row["labels"], row["precision"]) == ("none", "true", "bfloat16") and row["status"] == "ok"
    ]
    lines = [
        "| MNIST, 60,000 images | λ | seeds | LSS | OTS (n = 4,000) | test accuracy |",
        "|---|---|---|---|---|---|",
    ]
    cases = [
        (f"{name}, {'untrained' if epochs == 0 else 'trained'}", network, epochs, decay)
        for network, name in (("resnet", "ResNet"), ("plain", "plain"), ("radial", "radial scaler (control)"))
        for epochs, decay in ((0, 0.0), (6, 0.0), (6, 0.01))
    ]
    for title, network, epochs, decay in cases:
        key = {"network": network, "epochs": epochs, "weight_decay": decay}
        found = [row for row in rows if key.items() <= row.items()]
        if not found:
            continue
        values = []
        for value, form in (("lss_mean", ".2f"), ("ots_share", ".3f"), ("test_accuracy", ".3f")):
            (group,) = records.summarise(found, ["network"], value).values()
            spread = f" ± {group.sd:{form}}" if group.n > 1 else ""
            values.append(f"{group.mean:{form}}{spread}")
        lines.append(f"| {title} | {decay:g} | {len(found)} | {' | '.join(values)} |")
    return "\n".join(lines)


def test_results_table_is_that_of_the_records():
    """If this fails after new runs, put the table that `python tests/test_readme.py` prints into README.md."""
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_make_target_of_the_readme_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"make ([a-z0-9-]+)", text)) <= targets


if __name__ == "__main__":
    print(table())  # noqa: T201
