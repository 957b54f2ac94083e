"""Rows -> tasks of the RL stages: what the policy sees, and everything else for the rewards."""

from __future__ import annotations

from strop.data.formats import check_messages
from strop.data.sources import Rows, text_column
from strop.types import Task


def tasks_from_rows(rows: Rows, prompt_column: str = "prompt") -> list[Task]:
    """One Task per row: its prompt (text, or a list of messages) and all other columns; id is the row's "file:line".

    Raises ValueError, naming file:line, for a prompt that is missing, empty, or neither text nor messages.
    """
    tasks: list[Task] = []
    for index, row in enumerate(rows):
        where = rows.where(index)
        if row.get("chat_template_kwargs"):
            raise ValueError(f"{where}: column 'chat_template_kwargs' is not supported; remove it or set the template")
        prompt = row.get(prompt_column)
        if isinstance(prompt, list):
            prompt = check_messages(prompt, f"column {prompt_column!r}", where)
        else:
            prompt = text_column(row, prompt_column, where)
        columns = {name: value for name, value in row.items() if name != prompt_column}
        tasks.append(Task(id=where, prompt=prompt, columns=columns))
    return tasks
