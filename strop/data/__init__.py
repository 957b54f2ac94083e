"""Files -> rows -> examples -> batches. The label shift happens here, once (packing.py); iterators can be resumed."""

from strop.data.batches import PackedBatches, PretrainBatches, TaskBatches
from strop.data.comparisons import Comparison, ComparisonBatches, Comparisons, comparisons_from_rows
from strop.data.examples import Example, Examples, sft_examples
from strop.data.formats import read_feedback, read_preferences, read_supervised, read_unpaired
from strop.data.packing import pack, pack_completions, split_packed
from strop.data.shards import TokenShards, build_shards
from strop.data.sources import Rows, load_rows, stream_rows, stream_texts
from strop.data.tasks import tasks_from_rows

__all__ = [
    "Comparison",
    "ComparisonBatches",
    "Comparisons",
    "Example",
    "Examples",
    "PackedBatches",
    "PretrainBatches",
    "Rows",
    "TaskBatches",
    "TokenShards",
    "build_shards",
    "comparisons_from_rows",
    "load_rows",
    "pack",
    "pack_completions",
    "read_feedback",
    "read_preferences",
    "read_supervised",
    "read_unpaired",
    "sft_examples",
    "split_packed",
    "stream_rows",
    "stream_texts",
    "tasks_from_rows",
]
