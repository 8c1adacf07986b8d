"""What a step is: the one splitter of generator, labeller, trainer and scorer.

    Bars red 4 blue 2          step 0
    Sum 4 + 2 = 6              step 1
                               (a blank line is no step)
    The answer is 6            step 2, the last one

A step is a line with something on it; the line of the final answer is one. A response of one line has one
step, which is its last; an empty or blank response has none.
"""

from collections.abc import Sequence


def split(text: str) -> list[str]:
    """The steps of a response, without surrounding spaces."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def ends(tokens: Sequence[int], texts: Sequence[str]) -> list[int]:
    """Index of every step's last token: the one that brings its line break, or the response's last.

    Args:
      tokens: a response's ids, with or without its stop id.
      texts: what each id adds to a text (`draw.token_texts`).

    Returns:
      As many indices as `split` gives steps for the response's text, ascending; where one token closes two
      steps (`6\\n.\\n`), it comes twice.
    """
    found, written = list[int](), False
    for index, token in enumerate(tokens):
        head, *lines = texts[token].split("\n")
        written |= bool(head.strip())
        for line in lines:
            if written:
                found.append(index)
            written = bool(line.strip())
    if written:
        found.append(len(tokens) - 1)
    elif found:  # what follows the last line, a blank or the stop id, belongs to the last step
        found[-1] = len(tokens) - 1
    return found
