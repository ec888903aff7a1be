"""Tables of the reports: aligned, no wider than a page, safe as HTML."""

import html.parser
import json
import pathlib

import pytest

from flatopt import curvature, sharpness
from flatopt._core import tables
from flatopt.sharpness import _report as sharpness_report

TYPICAL = pathlib.Path(__file__).parents[2] / "docs" / "results" / "typical.json"


def parsed(text):
    """Rows of cells of the tables in HTML; refuses tags that are not closed."""

    class Parser(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.rows = [], []

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)
            if tag == "tr":
                self.rows.append([])
            if tag in ("td", "th"):
                self.rows[-1].append("")

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            if {*self.open} & {"td", "th"}:
                self.rows[-1][-1] += data

    parser = Parser()
    parser.feed(text)
    assert not parser.open
    return parser.rows


@pytest.mark.heart
def test_numbers_stand_to_the_right_and_meanings_below():
    rows = [("a", 1.0, "short"), ("longer", 123456.0, "word " * 30), ("b", "none", "")]
    lines = tables.table(("name", "value", "meaning"), rows).splitlines()
    assert max(map(len, lines)) <= 78
    assert lines[:3] == ["name        value", "a               1", "    short"]
    assert lines[3] == "longer  1.235e+05"
    assert all(line.startswith("    word") for line in lines[4:-1])
    assert lines[-1] == "b            none"


def test_html_holds_every_cell_and_escapes_it():
    rows = [("<b>", 0.5, "a & b"), ("c", "", "")]
    found = parsed(tables.html_table(("name", "value", "meaning"), rows))
    assert found == [
        ["name", "value", "meaning"],
        ["<b>", "0.5", "a & b"],
        ["c", "", ""],
    ]


def test_every_measure_has_a_unit_a_meaning_and_what_was_measured_as_typical():
    saved = json.loads(TYPICAL.read_text())["typical"]
    assert {name: [*pair] for name, pair in sharpness_report.TYPICAL.items()} == saved
    assert {*saved} == {*sharpness_report.EXPLAINED}
    for unit, meaning in sharpness_report.EXPLAINED.values():
        assert unit
        assert meaning


def test_a_report_of_sharpness_in_text_and_in_a_notebook():
    found = sharpness.Report(
        {"trace": curvature.Estimate(2.0, 0.25, 8), "worst_case": 1e-6},
        {"trace": 1.5, "worst_case": 61.0},
    )
    text = str(found)
    assert max(map(len, text.splitlines())) <= 78
    assert "It took 62 s with compilation." in text.replace("\n", " ")
    header, first, second = parsed(found._repr_html_())
    assert header[-1] == "meaning"
    assert (first[1], first[2], first[5]) == ("2", "0.25", "1.5")
    assert second[0] == "worst_case"
    assert second[2] == ""
    for row in (first, second):
        assert row[-1] in text.replace("\n    ", " ")
    assert found.to_dict()["seconds"] == 62.5
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
