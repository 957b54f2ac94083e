"""The tables of a preference store. History is append-only: triggers refuse every UPDATE and DELETE but of leases."""

from __future__ import annotations

APPLICATION_ID = 0x5354524B
"""'STRK', in the header of the SQLite file: how a store is told from any other database."""

VERSION = 1

HISTORY = ("prompts", "policies", "responses", "items", "item_responses", "presentations", "rankings", "audit")
"""The tables that only grow."""

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

CREATE TABLE prompts (
    id TEXT PRIMARY KEY,              -- SHA-256 of the content: the unit of every train/held-out split
    content TEXT NOT NULL,            -- JSON: text, or a list of messages
    created REAL NOT NULL
) STRICT;

CREATE TABLE policies (
    id INTEGER PRIMARY KEY,
    label TEXT NOT NULL,              -- RUN/STEP or a folder; people who rank never see it
    weights TEXT NOT NULL,            -- the checkpoint's content hash; '' where it is not known (imports)
    created REAL NOT NULL,
    UNIQUE (label, weights)
) STRICT;

CREATE TABLE responses (
    id INTEGER PRIMARY KEY,
    prompt_id TEXT NOT NULL REFERENCES prompts,
    policy_id INTEGER NOT NULL REFERENCES policies,
    sampling TEXT NOT NULL,           -- JSON: how it was drawn
    sample_index INTEGER NOT NULL,
    text TEXT NOT NULL,
    finish_reason TEXT NOT NULL,
    created REAL NOT NULL,
    UNIQUE (prompt_id, policy_id, sampling, sample_index)
) STRICT;

CREATE TABLE items (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,         -- hash of group_id, prompt and texts: the same item is never there twice
    group_id TEXT NOT NULL,           -- what an export calls it
    prompt_id TEXT NOT NULL REFERENCES prompts,
    num_responses INTEGER NOT NULL CHECK (num_responses >= 1),
    gold_ranks TEXT CHECK (json_array_length(gold_ranks) = num_responses),
    created REAL NOT NULL
) STRICT;
CREATE INDEX items_of_prompt ON items (prompt_id);

CREATE TABLE item_responses (
    item_id INTEGER NOT NULL REFERENCES items,
    position INTEGER NOT NULL,
    response_id INTEGER NOT NULL REFERENCES responses,
    PRIMARY KEY (item_id, position)
) STRICT;

CREATE TABLE presentations (
    id INTEGER PRIMARY KEY,
    item_id INTEGER NOT NULL REFERENCES items,
    annotator TEXT NOT NULL,
    purpose TEXT NOT NULL CHECK (purpose IN ('first', 'repeat')),
    shown_order TEXT NOT NULL,        -- JSON: shown_order[place on the page] = position in the item
    created REAL NOT NULL,
    UNIQUE (item_id, annotator, purpose)
) STRICT;
CREATE INDEX presentations_of_annotator ON presentations (annotator, id);

CREATE TABLE rankings (
    id INTEGER PRIMARY KEY,
    uuid TEXT NOT NULL UNIQUE,        -- chosen by the client: sending an answer twice stores it once
    presentation_id INTEGER NOT NULL REFERENCES presentations,
    verdict TEXT NOT NULL CHECK (verdict IN ('ranked', 'all_bad', 'all_good', 'skipped', 'undone')),
    ranks TEXT,                       -- JSON: ranks[position in the item], 1 = best, equal = tie, no gaps
    reason TEXT NOT NULL,
    comment TEXT NOT NULL,
    strength INTEGER CHECK (strength BETWEEN 1 AND 4),
    milliseconds INTEGER NOT NULL,
    supersedes INTEGER UNIQUE REFERENCES rankings,
    created REAL NOT NULL,
    CHECK ((ranks IS NULL) = (verdict IN ('skipped', 'undone')))
) STRICT;
-- One history per presentation, without branches: of two tabs that answer the same page, one is refused.
CREATE UNIQUE INDEX first_of_presentation ON rankings (presentation_id) WHERE supersedes IS NULL;
CREATE INDEX rankings_of_presentation ON rankings (presentation_id);
CREATE TRIGGER ranks_cover_what_was_shown BEFORE INSERT ON rankings
WHEN NEW.ranks IS NOT NULL AND json_array_length(NEW.ranks) !=
    (SELECT json_array_length(shown_order) FROM presentations WHERE id = NEW.presentation_id)
BEGIN SELECT RAISE(ABORT, 'ranks must cover exactly what was shown'); END;

CREATE TABLE leases (
    item_id INTEGER NOT NULL REFERENCES items,
    annotator TEXT NOT NULL,
    until REAL NOT NULL,
    PRIMARY KEY (item_id, annotator)
) STRICT;

CREATE TABLE audit (
    id INTEGER PRIMARY KEY, event TEXT NOT NULL, detail TEXT NOT NULL, created REAL NOT NULL
) STRICT;

CREATE VIEW answers AS               -- what holds now: the last word on each presentation, unless it was taken back
SELECT rankings.*, item_id, annotator, purpose, shown_order
FROM rankings JOIN presentations ON presentations.id = presentation_id
WHERE verdict != 'undone' AND NOT EXISTS (SELECT 1 FROM rankings AS later WHERE later.supersedes = rankings.id);
"""

TRIGGERS = "".join(
    f"CREATE TRIGGER {table}_only_grow_{verb} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, '{table}: history is append-only'); END;\n"
    for table in HISTORY
    for verb in ("UPDATE", "DELETE")
)

SCHEMA = TABLES + TRIGGERS
