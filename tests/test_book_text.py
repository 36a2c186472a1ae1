"""What the text of the book must hold, read from the sources: no build, no browser."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
CHAPTERS = [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]
PAGES = [ROOT / f"{file}.md" for file in (TOC["root"], *CHAPTERS)]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
GLOSSARY = re.search(r"(?ms)^```\{glossary\}\n(.*?)^```$", TEXT["notation.md"])[1]
# What is not running prose: the header, code, headings, options, formulas, roles and literals.
SILENT = re.compile(
    r"(?sm)\A---\n.*?\n---\n|^(`{3,})(?:\{(?:code-cell|math)\}|\w).*?^\1$"
    r"|^(?: {4,}|#|:[\w-]+:|[`:]{3,}|\([\w-]+\)=$).*?$"
    r"|\$\$.*?\$\$|\$[^$]*\$|\{[\w:]+\}`[^`]*`|`[^`\n]*`"
)
LINK = re.compile(r"\{term\}`(?:([^`<]+) <([^`>]+)>|([^`<]+))`")
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


def entries() -> list[list[str]]:
    """The entries of the glossary, each with the names under which it is found."""
    found: list[list[str]] = [[]]
    for line in GLOSSARY.splitlines():
        if line and line[0] != " ":
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [names for names in found if names]


def links(name: str) -> list[tuple[int, str, str]]:
    """The links of a page to the glossary: place, words and term."""
    return [(m.start(), m[1] or m[3], m[2] or m[3]) for m in LINK.finditer(TEXT[name])]


def test_every_term_of_the_glossary_is_linked_from_a_chapter():
    used = {term for name in TEXT if name != "notation.md" for _, _, term in links(name)}
    assert [names for names in entries() if not used & set(names)] == []


def test_the_glossary_is_in_alphabetical_order():
    first = [names[0].lower() for names in entries()]
    assert len(first) > 10
    assert first == sorted(first)


@pytest.mark.parametrize("name", sorted(set(TEXT) - {"notation.md"}))
def test_a_chapter_links_a_term_once_and_where_it_is_first_used(name):
    terms = [next(k for k, names in enumerate(entries()) if term in names) for _, _, term in links(name)]
    assert sorted(terms) == sorted(set(terms))
    for place, words, _ in links(name):
        before = SILENT.sub(" ", TEXT[name][:place])
        assert not re.search(rf"\b{re.escape(words)}\b", before), (words, "is used before its link")
