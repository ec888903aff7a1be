"""What leaves the house: links, archives, versions, and the commands that check them."""

import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
import yaml

import flatopt

PARENTS = pathlib.Path(__file__).parents
ROOT = next(path for path in PARENTS if (path / "pyproject.toml").exists())
README = (ROOT / "README.md").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HOME = "https://github.com/flatopt/flatopt"
OWN_FILES = (
    f"{HOME}/blob/main/",
    "https://raw.githubusercontent.com/flatopt/flatopt/main/",
    "https://colab.research.google.com/github/flatopt/flatopt/blob/main/",
)

# Links: a package index shows the README alone.


def links(text):
    """Targets of inline links and images, of reference definitions and of HTML."""
    text = re.sub(r"```.*?```|`[^`]*`", " ", text, flags=re.DOTALL)
    patterns = (
        r"\]\(\s*<?([^)\s>]+)",
        r"^ {0,3}\[[^\]]+\]:\s*<?([^\s>]+)",
        r"""\b(?:href|src|srcset)\s*=\s*["']?([^"'\s>]+)""",
    )
    return [t for p in patterns for t in re.findall(p, text, re.MULTILINE)]


def is_absolute(link):
    return link.startswith(("https://", "#"))


@pytest.mark.parametrize(
    ("text", "found", "absolute"),
    [
        ("see [it](docs/a.md)", "docs/a.md", False),
        ("[it](<docs/a.md> 'title')", "docs/a.md", False),
        ("![a figure](./a.png)", "./a.png", False),
        ("[![a badge](a.svg)](https://a.b)", "a.svg", False),
        ("[it][a]\n\n[a]: ../a.md", "../a.md", False),
        ('<img width="9" src="a.png">', "a.png", False),
        ("<a href=/a>it</a>", "/a", False),
        ("[it](https://a.b/c)", "https://a.b/c", True),
        ("[above](#install)", "#install", True),
    ],
)
def test_links_are_found_and_told_apart(text, found, absolute):
    assert found in links(text)
    assert is_absolute(found) == absolute


@pytest.mark.heart
def test_no_link_of_the_readme_is_relative():
    found = links(README)
    assert len(found) > 30
    assert not [link for link in found if not is_absolute(link)]


def test_links_into_this_repository_lead_to_files():
    addresses = [*links(README), *PROJECT["urls"].values()]
    paths = [
        link.removeprefix(start).partition("#")[0]
        for link in addresses
        for start in OWN_FILES
        if link.startswith(start)
    ]
    assert len(paths) > 25
    assert not [path for path in paths if not (ROOT / path).is_file()]


def test_every_page_speaks_of_one_repository():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    urls = PROJECT["urls"]
    assert urls["Source"] == citation["repository-code"] == HOME
    assert urls["Documentation"] == citation["url"]


# Archives


def build(folder, kind):
    # Without isolation: hatchling is in the `dev` extra, and nothing is downloaded.
    command = ["-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True
    )
    (archive,) = folder.iterdir()
    return archive


def files_below(*folders):
    suffixes = {".ipynb", ".json", ".md", ".png", ".py", ".typed"}
    made = {"_build", "jupyter_execute"}
    return {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and not made & set(path.parts)
    }


def test_the_wheel_is_the_package_and_its_mark_of_types(tmp_path):
    archive = build(tmp_path, "wheel")
    names = zipfile.ZipFile(archive).namelist()
    package = {name for name in names if ".dist-info/" not in name}
    assert package == files_below("flatopt")
    assert "flatopt/py.typed" in package


def test_the_sdist_is_all_that_the_tests_read(tmp_path):
    with tarfile.open(build(tmp_path, "sdist")) as archive:
        names = [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]
    expected = files_below("benchmarks", "docs", "examples", "flatopt", "tests")
    expected |= {"Makefile", "README.md", "CHANGELOG.md", "CITATION.cff", "floor.txt"}
    expected |= {".ci/run", *(str(path.relative_to(ROOT)) for path in WORKFLOWS)}
    assert expected <= set(names)


# Versions


@pytest.mark.heart
def test_package_changelog_and_citation_name_one_release():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    dated = [re.fullmatch(r"\[(.+)\] - (\d{4}-\d\d-\d\d)", h) for h in headings[1:]]
    assert all(dated)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    release = (str(citation["version"]), str(citation["date-released"]))
    assert dated[0].groups() == release
    assert flatopt.__version__ == release[0]


def test_python_versions_that_are_claimed_are_tested():
    classifiers = [c.rpartition(" ")[2] for c in PROJECT["classifiers"]]
    claimed = {c for c in classifiers if re.fullmatch(r"3\.\d+", c)}
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    rows = tests["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert claimed
    assert claimed <= {r["python"] for r in rows if r["target"].startswith("test")}
    oldest = min(claimed, key=lambda version: int(version[2:]))
    assert PROJECT["requires-python"] == f">={oldest}"
    assert {"python": oldest, "target": "test-floor"} in rows


# Commands


def targets_of(text):
    return re.findall(r"^make ([\w-]+)", text, re.MULTILINE)


def commands_of_ci():
    return targets_of((ROOT / ".ci" / "run").read_text())


def test_contributing_says_what_a_change_must_pass():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"`\.ci/run` runs.*?```\n(.*?)```", text, re.DOTALL)
    assert targets_of(block) == commands_of_ci()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_make_alone(path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job.get("steps", ())]
    commands = [step["run"] for step in steps if "run" in step]
    rows = [
        row
        for job in jobs.values()
        for row in job.get("strategy", {}).get("matrix", {}).get("include", ())
    ]
    assert commands
    targets = [c.removeprefix("make ") for c in commands] + [r["target"] for r in rows]
    assert set(targets) <= TARGETS | {"${{ matrix.target }}"}


def test_workflows_and_ci_check_the_same():
    text = "\n".join(path.read_text() for path in WORKFLOWS)
    named = set(re.findall(r"(?:target:|run: make) ([\w-]+)", text))
    assert set(commands_of_ci()) == named <= TARGETS


def test_hooks_and_lint_have_one_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    assert [e.split()[:2] for e in entries] == [
        [".venv/bin/ruff", "check"],
        [".venv/bin/ruff", "format"],
    ]
    dev = PROJECT["optional-dependencies"]["dev"]
    assert [re.fullmatch(r"ruff==\d+\.\d+\.\d+", d) for d in dev if d[:4] == "ruff"][0]
