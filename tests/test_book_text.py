"""What the text of the book must hold, read from the sources: no build, no browser."""

import re
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [ROOT / f"{file}.md" for file in (TOC["root"], *(chapter["file"] for chapter in TOC["chapters"]))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
LABEL = re.compile(r"^(?:\$\$ \(eq-paper-(\d+)\)|:label: eq-paper-(\d+))$", re.MULTILINE)


def test_equations_1_to_41_of_the_paper_stand_in_the_book_once_each():
    """The numbered equations of the paper's sections 2 to 4; those of section 5 are its scores and experiments."""
    defined = Counter(int(one or two) for text in TEXT.values() for one, two in LABEL.findall(text))
    assert {number: defined[number] for number in range(1, 42) if defined[number] != 1} == {}


def test_every_page_is_in_the_table_of_contents():
    assert {page.name for page in (ROOT / "book").glob("*.md")} == set(TEXT)


def test_every_entry_of_the_bibliography_is_cited():
    entries = re.findall(
        r"^@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text(encoding="utf-8"), re.MULTILINE
    )
    cited = {
        key.strip()
        for text in TEXT.values()
        for keys in re.findall(r"\{cite[^}]*\}`([^`]+)`", text)
        for key in keys.split(",")
    }
    assert sorted(set(entries) - cited) == []


def test_every_chapter_opens_with_its_question_and_its_answer():
    aids = {"intro.md", "experiment.md", "notation.md", "bibliography.md"}
    for name in set(TEXT) - aids:
        opening = TEXT[name].split("\n## ")[0]
        assert "**Question.**" in opening, name
        assert "**Short answer.**" in opening.split("**Question.**")[1], name


def test_no_picture_bypasses_the_helper_that_asks_for_words():
    assert [name for name, text in TEXT.items() if re.search(r"plt\.show\(|!\[\]\(", text)] == []
