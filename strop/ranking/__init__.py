"""People (or a synthetic judge) rank completions: the store, its exports, the agreement of those who rank, the page.

Nothing here but sampling.py needs torch, and nothing but app.py and security.py needs a web server.
"""

from strop.ranking.agreement import Agreement, Share, agreement, krippendorff_alpha, win_rates
from strop.ranking.answers import Answer, ConflictError, submit, undo
from strop.ranking.export import ExportFormat, ExportReport, Ranking, export_rankings, rankings
from strop.ranking.imports import ImportReport, import_rankings, load_gold
from strop.ranking.judge import Judge, rank_with_judge, ranks_from_scores
from strop.ranking.queue import Presentation, Progress, next_item, progress
from strop.ranking.store import PreferenceStore, Settings

__all__ = [
    "Agreement",
    "Answer",
    "ConflictError",
    "ExportFormat",
    "ExportReport",
    "ImportReport",
    "Judge",
    "PreferenceStore",
    "Presentation",
    "Progress",
    "Ranking",
    "Settings",
    "Share",
    "agreement",
    "export_rankings",
    "import_rankings",
    "krippendorff_alpha",
    "load_gold",
    "next_item",
    "progress",
    "rank_with_judge",
    "rankings",
    "ranks_from_scores",
    "submit",
    "undo",
    "win_rates",
]
