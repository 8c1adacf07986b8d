"""What a step is: the one splitter of generator, labeller, trainer and scorer.

    Bars red 4 blue 2          step 0
    Sum 4 + 2 = 6              step 1
                               (a blank line is no step)
    The answer is 6            step 2, the last one

A step is a line that is not blank; the line with the final answer is a step too. A response of one line has
one step, which is also its last; an empty or blank response has none.
"""

from collections.abc import Sequence


def split(text: str) -> list[str]:
    """The steps of a response, without surrounding whitespace."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def ends(tokens: Sequence[int], texts: Sequence[str]) -> list[int]:
    """Index of the last token of each step: the token that holds its line break, or the last of the response.

    Args:
      tokens: a response's ids, with or without its stop id.
      texts: the text that each id adds to a response (`draw.token_texts`).

    Returns:
      As many indices as `split` gives steps for the response's text, ascending; where one token closes two
      steps (`6\\n.\\n`), its index comes twice.
    """
    found: list[int] = []
    written = False  # whether the current line is not blank
    for index, token in enumerate(tokens):
        head, *lines = texts[token].split("\n")
        written |= bool(head.strip())
        for line in lines:
            if written:
                found.append(index)
            written = bool(line.strip())
    if written:
        found.append(len(tokens) - 1)
    elif found:  # whatever follows the last line, blanks or the stop id, belongs to the last step
        found[-1] = len(tokens) - 1
    return found
