"""Which part of a completion is the program."""

from __future__ import annotations

import re

CONTINUATION_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
"""Where a model that goes on past the end of the function has begun something else (Chen et al. 2021, section 2.1)."""

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)
_PYTHON = ("python", "py", "python3")


def last_block(text: str) -> str | None:
    """The content of the last fenced block marked python, or else of the last one without a mark; None without either.

    A block that is never closed reaches to the end of the text. Only ever one block: the versions before it, or an
    example of use behind the last one in a block marked otherwise, do not count.
    """
    blocks: list[tuple[str, str]] = []
    position = 0
    while opening := _FENCE.search(text, position):
        fence, mark = opening.groups()
        start = opening.end() + 1
        closing = re.compile(rf"^[ \t]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*$", re.MULTILINE).search(text, start)
        blocks.append((mark.lower(), text[start : closing.start() if closing else len(text)]))
        if closing is None:
            break
        position = closing.end()
    for marks in (_PYTHON, ("",)):
        found = [content for mark, content in blocks if mark in marks]
        if found:
            return found[-1]
    return None


def program(prompt: str | None, completion: str) -> str | None:
    """The program that an answer is, or None.

    A text prompt is continued: prompt and completion in one, the completion cut at the first of CONTINUATION_STOPS. A
    fence there ends the program, whatever follows it. In a chat (prompt None) it is the last fenced block, or the whole
    answer when it has no block; None when that is empty.
    """
    if prompt is None:
        block = last_block(completion)
        code = completion if block is None else block
        return code if code.strip() else None
    end = min((place for stop in CONTINUATION_STOPS if (place := completion.find(stop)) >= 0), default=len(completion))
    return prompt + completion[:end]
