"""Tables in text: aligned columns, for the reports."""


def table(header, rows):
    """Lines of aligned columns: the first and the last to the left, the rest to the right.

    Example:
      >>> print(table(("name", "value"), [("trace", "2.5"), ("loss", "0.125")]))
      name   value
      trace  2.5
      loss   0.125
    """
    lines = [header, *rows]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(header))]
    last = len(header) - 1

    def cell(text, index):
        if index in (0, last):
            return f"{text:<{widths[index]}}"
        return f"{text:>{widths[index]}}"

    return "\n".join(
        "  ".join(cell(str(text), index) for index, text in enumerate(line)).rstrip()
        for line in lines
    )


def number(value):
    """A number to four digits.

    Example:
      >>> number(1234.56), number(0.00001234)
      ('1235', '1.234e-05')
    """
    return f"{float(value):.4g}"
