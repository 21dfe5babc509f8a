"""Proofs of kernels for other machines: run again when their sources changed, and by `make proofs`.

    python tests/kernels/proofs.py     # runs all, then writes down for which sources they hold

They compile for processors and GPUs that are not here, and run what comes of it on emulators, which
takes minutes and depends on nothing but these sources. proofs.json has their hashes.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_suffix(".json")
NATIVE = (
    *("fp4graph/kernels/cpu/native/*", "fp4graph/kernels/cpu/build.py"),
    *("tests/kernels/native/**/*", "tests/kernels/test_native.py"),
)
TRITON = (
    *("fp4graph/kernels/triton/**/*.py", "fp4graph/kernels/target.py", "fp4graph/formats/*.py"),
    *("tests/kernels/*ptx*.py", "tests/kernels/machine_code.*", "tests/kernels/known_failures.py"),
    *("tests/kernels/emulator.py", "tests/kernels/offline.py", "tests/kernels/on_cpu.py"),
    *("tests/kernels/*triton*.py", "tests/kernels/test_m*.py"),
    *("tests/kernels/test_scaled_mm.py", "fp4graph/kernels/scaled_mm.py"),
)


def _digest(patterns: tuple[str, ...]) -> str:
    files = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def today() -> dict[str, str]:
    """Return the hashes of the sources; Triton's with its version, which compiles them."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"native": _digest(NATIVE), "triton": f"{_digest(TRITON)}, triton {triton}"}


def holds(group: str) -> bool:
    """Say whether a group of proofs was run for the sources as they are."""
    return bool(json.loads(FILE.read_text()).get(group) == today()[group])


def main() -> int:
    """Run all proofs; where they pass, write down for which sources."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-m", "proof", "--proofs"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code == 0:
        FILE.write_text(json.dumps(today(), indent=1) + "\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
