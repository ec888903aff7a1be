"""The checker of the built documentation finds what is wrong, and nothing else."""

import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).parent.parent / "docs" / "check.py"
SPEC = importlib.util.spec_from_file_location("docs_check", PATH)
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)

GOOD = """<!doctype html><meta name="viewport" content="width=device-width">
<article><a href="other.html#there">a</a> <a href="https://example.org/x">b</a>
<img src="dot.svg" alt="a dot"> <pre style="overflow-x:auto">short</pre></article>"""
OTHER = '<!doctype html><p id="there">here</p><a href="index.html">back</a>'
DOT = """<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">
<rect width="9" height="9" fill="white"/></svg>"""


@pytest.fixture
def site(tmp_path):
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "other.html").write_text(OTHER)
    (tmp_path / "dot.svg").write_text(DOT)
    return tmp_path


@pytest.mark.heart
def test_links_anchors_and_texts(site):
    assert check.check_files(site) == []
    (site / "other.html").write_text(
        '<a href="gone.html">x</a><a href="index.html#gone">y</a><img src="dot.svg">'
        '<img src="dot.svg" alt="dot.svg">'
    )
    assert check.check_files(site) == [
        "index.html: no anchor for other.html#there",
        "other.html: image dot.svg has no alt text",
        "other.html: image dot.svg has no alt text",
        "other.html: no file for gone.html",
        "other.html: no anchor for index.html#gone",
    ]


def test_without_a_browser_it_says_so_in_one_line(site, monkeypatch, capsys):
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    check.main(site)
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "no Chromium is found: links and texts of images alone were checked",
        "no problems",
    ]
    with pytest.raises(SystemExit, match="holds no built documentation; run make docs"):
        check.main(site / "nowhere")


@pytest.mark.skipif(check.find_chromium() is None, reason="no Chromium is found")
def test_in_a_browser(site):
    browser = check.find_chromium()
    assert check.check_browser(site, browser) == []
    wide = "word" * 60
    (site / "other.html").write_text(
        f'<!doctype html><article><div style="width:700px">{wide}</div>'
        f'<pre style="overflow-x:auto;width:300px">{wide}</pre>'
        '<span class="math">x</span><img src="gone.svg" alt="gone"></article>'
    )
    found = check.check_browser(site, browser)
    assert all(problem.startswith("other.html") for problem in found)
    for width, what in (
        (400, "the page is"),
        (400, "div sticks out"),
        (1280, "pixels too wide: word"),
        (1280, "formula does not show: x"),
        (1280, "image does not show: gone.svg"),
    ):
        assert any(f"at {width}" in p and what in p for p in found), (width, what)
    assert not any("at 400: code" in problem for problem in found)


@pytest.mark.skipif(check.find_chromium() is None, reason="no Chromium is found")
def test_in_a_browser_broken_words_and_titles_that_are_cut(site):
    browser = check.find_chromium()
    page = (
        "<!doctype html><article><table><tr><td style='width:1em;max-width:1em;{}'>"
        "0.066 to 0.20</table></article><div class='bd-sidebar-secondary' style="
        "'position:fixed;left:1200px'><a href='index.html'>{}</a></div>"
    )
    good = page.format("overflow:hidden", "a title")
    (site / "other.html").write_text(good)
    assert check.check_browser(site, browser) == []
    (site / "other.html").write_text(page.format("word-break:break-all", "title" * 9))
    found = check.check_browser(site, browser)
    assert "other.html at 400: a word of a table is broken: 0.066" in found
    assert "other.html at 1280: the list of titles is cut: " + "title" * 9 in found


@pytest.mark.skipif(check.find_chromium() is None, reason="no Chromium is found")
def test_both_themes_in_a_browser(site):
    (site / "clear.svg").write_text(DOT.replace("<rect", "<rect fill-opacity='0.3'"))
    (site / "other.html").write_text(
        "<!doctype html><style>body { background: white } "
        "[data-theme=dark] body { background: #121212 } [data-theme=dark] p { color: #eee } "
        "</style><article><p>fine</p><i>black</i><b style='color:#ddd'>pale</b>"
        "<code style='color:#ddd;background:#222'>own ground</code>"
        "<img src='dot.svg' alt='a dot'><img src='clear.svg' alt='glass'></article>"
    )
    assert check.check_browser(site, check.find_chromium()) == [
        "other.html in light: contrast of text is 1.4: pale",
        "other.html in light: image has no ground: clear.svg",
        "other.html in dark: contrast of text is 1.1: black",
        "other.html in dark: image has no ground: clear.svg",
    ]
