"""Runs the fast tests with every promised pair of Python and JAX that can be had here, and prints a table.

    python tests/matrix.py [--python 3.12] [--jax 0.11] [-- pytest arguments]

The Pythons are those on the PATH (`python3.12`) and of pyenv. Each pair gets a fresh virtual environment with the pins
of requirements.txt, but for JAX and Flax. The exit status is 1 if a pair fails.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
PROMISED = {"3.11": ["0.10"], "3.12": ["0.10", "0.11", "0.12"], "3.13": ["0.10", "0.11", "0.12"]}  # as pyproject.toml
FAST = ["-n", "2", "--dist", "loadfile", "-m", "not process and not slow"]


def interpreter(version: str) -> str | None:
    """The path of a Python of this version."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv")) / "versions"
    paths = [str(path / "bin" / "python") for path in sorted(pyenv.glob(f"{version}.*"))]
    return next(filter(os.path.exists, paths), None) or shutil.which(f"python{version}")


def outcome(python: str, jax: str, arguments: list[str]) -> str:
    """Installs and tests; returns the last line of what failed, or of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        own = pathlib.Path(folder) / "bin" / "python"
        pins = [line for name in ("", "-dev") for line in (ROOT / f"requirements{name}.txt").read_text().splitlines()]
        pins = [line for line in pins if not line.startswith(("#", "jax==", "flax=="))]
        pins += [f"jax=={jax}.*", "flax>=0.12.7,<0.13"]
        install = [str(own), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (
            [python, "-m", "venv", folder],
            [*install, *pins],
            [*install, "--no-deps", "-e", str(ROOT)],
            [str(own), "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or FAST)],
        ):
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            last = (result.stdout + result.stderr).strip().splitlines()[-1:]
            if result.returncode:
                return f"failed with status {result.returncode}: {''.join(last)}"
        return "".join(last)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", choices=PROMISED, help="only this Python")
    parser.add_argument("--jax", help="only this JAX")
    parser.add_argument("arguments", nargs="*", help="of pytest, instead of those of the fast tests")
    options = parser.parse_args()
    outcomes = []
    for version in [options.python] if options.python else PROMISED:
        for jax in [options.jax] if options.jax else PROMISED[version]:
            python = interpreter(version)
            outcomes.append(outcome(python, jax, options.arguments) if python else "this Python is not here")
            print(f"Python {version}  JAX {jax}  {outcomes[-1]}", flush=True)
    sys.exit(any(text.startswith("failed") for text in outcomes))
