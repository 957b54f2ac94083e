"""A checkpoint as a file or folder for other runtimes: GGUF for llama.cpp, one merged folder for Hugging Face's."""

from strop.export.check import check_folder, check_gguf, require_runtime
from strop.export.gguf_file import GGUF_DTYPES, write_gguf
from strop.export.target import FOLDER_DTYPES, check_target, new_target, write_folder

__all__ = [
    "FOLDER_DTYPES",
    "GGUF_DTYPES",
    "check_folder",
    "check_gguf",
    "check_target",
    "new_target",
    "require_runtime",
    "write_folder",
    "write_gguf",
]
