"""Fetch the wheels of the engines that plug-ins are written for and unpack what is Python: python .ci/engines.py FOLDER

Nothing of them is installed or run; `tests/policy/engines` imports them from the folder.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = ("vllm==0.33.0", "sglang==0.5.23")
BESIDE = ("msgspec", "orjson", "psutil", "pybase64", "dill", "einops")
"""Small packages that they need at import and that nothing can stand in for."""
COMPILED = (".so", ".cu", ".cubin")


def main(folder: Path) -> int:
    """0 = all are there."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as wheels:
        subprocess.run([*pip, "download", "-q", "--no-deps", "--only-binary=:all:", "-d", wheels, *WHEELS], check=True)
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if not name.endswith(COMPILED)]
                archive.extractall(folder, names)
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(folder), *BESIDE], check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
