"""Tables in Markdown, and what stands in their cells."""


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def versions_of(report):
    return ", ".join(f"{name} {version}" for name, version in report.items())


def ratio(value, reference, digits=2):
    return f"{value / reference:.{digits}f}" if value and reference else "–"


def reason(row):
    """Why there is no figure, in a cell."""
    text = row.get("skipped") or row.get("error") or "no figure"
    return text.replace("|", "/")


def megabytes(size):
    return "–" if size is None else f"{size / 1e6:.0f}"
