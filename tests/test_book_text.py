"""What the text of the book must hold, read from the sources: no build, no browser."""

import re
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
LABEL = re.compile(r"^(?:\$\$ \(eq-paper-(\d+)\)|:label: eq-paper-(\d+))$", re.MULTILINE)


def pages():
    """The text of every page in the table of contents; drafts outside it do not count."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [toc["root"], *(chapter["file"] for chapter in toc["chapters"])]
    return [(ROOT / f"{file}.md").read_text(encoding="utf-8") for file in files]


def test_equations_1_to_41_of_the_paper_stand_in_the_book_once_each():
    """The numbered equations of the paper's sections 2 to 4; those of section 5 are its scores and experiments."""
    defined = Counter(int(one or two) for page in pages() for one, two in LABEL.findall(page))
    assert {number: defined[number] for number in range(1, 42) if defined[number] != 1} == {}
