"""The words of the chapters: spelt right, and in British spelling throughout."""

import re
from pathlib import Path

import codespell_lib
import pytest
from spellchecker import SpellChecker

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "book").glob("*.md")), *sorted(ROOT.glob("*.md"))]
# Names and terms of the field that no general dictionary has.
TERMS = set((ROOT / "tests" / "words.txt").read_text(encoding="utf-8").split())
SHARED = {"biased", "program"}  # listed as American, and British as well
LIST = Path(codespell_lib.__file__).parent / "data" / "dictionary_en-GB_to_en-US.txt"
PAIRS = [line.split("->") for line in LIST.read_text(encoding="utf-8").splitlines() if line]
BRITISH = {american: british for british, american in PAIRS if american not in SHARED}
CODE = re.compile(r"(?sm)^(`{3,})(\{(?:code-cell|math)\}|\w).*?^\1$")
SILENT = (
    r"(?s)\A---\n.*?\n---\n",  # the header
    r"(?m)^ {4,}.*$|^:[\w-]+:.*$|^[`:]{3,}.*$|^\([\w-]+\)=$",  # commands, options, fences, labels
    r"\{[\w:]+\}`[^`]*`|`[^`\n]*`|https?://\S+",  # roles, code, addresses
    r"(?s)\$\$.*?\$\$|\$[^$]*\$",
)


def words(page: Path) -> set[str]:
    """The words of a page that a reader reads as prose, captions included, in small letters."""
    text = page.read_text(encoding="utf-8")
    text = CODE.sub(lambda code: " ".join(re.findall(r"(?s)caption: (.*?)(?=\n\S)", code[0])), text)
    for pattern in SILENT:
        text = re.sub(pattern, " ", text)
    return {re.sub(r"['’]s?$", "", word.lower()) for word in re.findall(r"[^\W\d_][^\W\d_'’]+", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_words_are_spelt_right(page):
    assert sorted(SpellChecker().unknown(words(page) - TERMS - set(BRITISH.values()))) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_spelling_is_british(page):
    assert {word: BRITISH[word] for word in words(page) if word in BRITISH} == {}


def test_every_term_is_used():
    assert sorted(TERMS - set().union(*map(words, PAGES))) == []
