"""Each row of docs/zmtp-profile.md names tests, and they exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PROFILE = TESTS.parent / "docs" / "zmtp-profile.md"
NAMES = {
    node.name
    for path in TESTS.rglob("test_*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}


def rows(text):
    """Return the cells of each row of each table, without headings and rules."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [it for it in cells if it[0].strip() != "requirement" and not set(it[0]) <= set("-")]


def wrong(row):
    """Return what is wrong with a row."""
    if len(row) != 4:
        return "it has not four cells"
    named = re.findall(r"`(test_\w+)`", row[3])
    if not named:
        return "no test"
    return sorted(set(named) - NAMES) or None


@pytest.mark.parametrize("row", rows(PROFILE.read_text()), ids=lambda row: row[0].strip()[:40])
def test_a_row_of_the_profile_has_tests_that_exist(row):
    assert not wrong(row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("|a|b|c|`test_a_row_of_the_profile_has_tests_that_exist`|", None),
        ("|a|b|c| |", "no test"),
        ("|a|b|c|`test_nothing`|", ["test_nothing"]),
        ("|a|b|`test_nothing`|", "it has not four cells"),
    ],
)
def test_what_is_wrong_with_a_row_is_noticed(row, expected):
    (cells,) = rows("| requirement | b | c | d |\n|---|---|---|---|\n" + row)

    assert wrong(cells) == expected
