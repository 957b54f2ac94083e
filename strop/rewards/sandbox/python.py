"""Where the programs are that a box is made of."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

NOBODY = 65534
INSTALL_BUBBLEWRAP = "apt-get install bubblewrap"


def bwrap_path() -> str:
    """Raises FileNotFoundError with the line to run."""
    found = shutil.which("bwrap")
    if found is None:
        raise FileNotFoundError(
            f"there is no sandbox: bubblewrap is not installed; run as root: {INSTALL_BUBBLEWRAP} "
            "(or the like on a system that is not Debian)"
        )
    return found


def find_python(wanted: str | None) -> tuple[str, str]:
    """The interpreter for boxes and the folder that holds it and its library.

    Unless one is wanted, this process's own (without its virtual environment), or the system's where a box, which runs
    as nobody, cannot get at it. Raises FileNotFoundError.
    """
    if wanted is None:
        own = os.path.realpath(sys.executable)
        if os.geteuid() != 0 or is_open_to_all(own):
            return own, sys.base_prefix
        wanted = shutil.which("python3", path="/usr/bin:/usr/local/bin")
        if wanted is None:
            raise FileNotFoundError(
                f"boxes run as nobody, who cannot reach {own}, and there is no /usr/bin/python3: install one, or name "
                "another with the option python"
            )
    try:
        done = subprocess.run(
            [wanted, "-I", "-S", "-c", "import sys; print(sys.base_prefix)"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise FileNotFoundError(f"python {wanted!r} does not run: {error}") from None
    return os.path.realpath(wanted), done.stdout.strip()


def is_open_to_all(path: str) -> bool:
    """Whether nobody, as whom boxes run where we are root, gets to it."""
    return all(place.stat().st_mode & stat.S_IXOTH for place in (Path(path), *Path(path).parents))
