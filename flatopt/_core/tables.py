"""Tables of the reports, in text and in HTML: aligned columns, each row explained."""

import html
import textwrap

WIDTH = 78  # of a cell of code in the documentation
OF_MEASURES = ("measure", "value", "error", "unit", "typical", "seconds", "meaning")


def table(header, rows):
    """Lines of aligned columns, each followed by its last cell on lines of its own.

    Numbers go to the right, words to the left. The last cell says what the row means.

    Example:
      >>> print(table(("name", "value", "meaning"), [("trace", 2.5, "of H"), ("B", 10, "")]))
      name   value
      trace    2.5
          of H
      B         10
    """
    columns = len(header) - 1
    texts = [[cell_text(cell) for cell in row[:columns]] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    to_right = [is_number_column(rows, index) for index in range(columns)]
    lines = []
    for row, line in zip((header, *rows), texts, strict=True):
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, to_right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
        if row is not header and row[columns]:
            lines += indented(row[columns])
    return "\n".join(lines)


def row_of_measure(name, value, error, unit, typical, took, meaning):
    """A row of a table under ``OF_MEASURES``; the typical values are numbers or none.

    Example:
      >>> row_of_measure("trace", 2.5, "0.1", "loss", (1.0, 3.0), 0.25, "of H")[4:6]
      ('1 to 3', '0.2')
    """
    usual = " to ".join(f"{x:g}" for x in typical)
    seconds = "" if took is None else f"{took:.1f}"
    return name, value, error, unit, usual, seconds, meaning


def note_of_time(note, seconds):
    """A note, and what all parts took where that is known."""
    if seconds is None:
        return note
    return f"{note} It took {duration(sum(seconds.values()))} with compilation."


def indented(text):
    """A sentence under what it explains."""
    space = " " * 4
    return textwrap.wrap(text, WIDTH, initial_indent=space, subsequent_indent=space)


def wrapped(text):
    """A sentence on lines that fit the documentation."""
    return textwrap.wrap(text, WIDTH)


def html_table(header, rows):
    """The same as an HTML table, where the meaning is a column.

    Example:
      >>> print(html_table(("name", "value"), [("a < b", 2.5)]))
      <table>
      <tr><th style="text-align:left">name</th><th style="text-align:right">value</th></tr>
      <tr><td style="text-align:left">a &lt; b</td><td style="text-align:right">2.5</td></tr>
      </table>
    """
    sides = [
        "right" if is_number_column(rows, index) else "left"
        for index in range(len(header))
    ]

    def line(row, tag):
        cells = [
            f'<{tag} style="text-align:{side}">{html.escape(cell_text(cell))}</{tag}>'
            for cell, side in zip(row, sides, strict=True)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    lines = [line(header, "th"), *[line(row, "td") for row in rows]]
    return "\n".join(["<table>", *lines, "</table>"])


def paragraph(text):
    """A sentence in HTML."""
    return f"<p>{html.escape(text)}</p>"


def is_number_column(rows, index):
    """Whether a column holds numbers; empty cells are neither."""
    return any(not isinstance(row[index], str) for row in rows)


def cell_text(cell):
    """A word as it is; a number to four digits.

    Example:
      >>> cell_text("trace"), cell_text(1234.56), cell_text(0.00001234)
      ('trace', '1235', '1.234e-05')
    """
    return cell if isinstance(cell, str) else f"{float(cell):.4g}"


def duration(seconds):
    """A time in words.

    Example:
      >>> duration(0.04), duration(12.34), duration(95)
      ('0.0 s', '12.3 s', '95 s')
    """
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds:.0f} s"
