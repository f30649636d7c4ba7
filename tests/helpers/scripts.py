"""Scripts in processes of their own."""

import os
import socket
import subprocess
import sys

import nbclient
import nbformat

from helpers.configs import ROOT


def environment(as_for_users=False, num_devices=1, **variables):
    """The variables of a process that has one device, or several, and compiles quickly, or as for users."""
    flags = [] if as_for_users else [os.environ["XLA_FLAGS_OF_SCRIPTS"]]
    flags += [f"--xla_force_host_platform_device_count={num_devices}"] if num_devices > 1 else []
    return os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)} | variables


def start(script, *arguments, cwd=ROOT, **options):
    """Starts `python <script>.py <arguments>`; `options` are those of `environment`."""
    return spawn([sys.executable, ROOT / f"{script}.py", *arguments], cwd, **options)


def spawn(command, cwd, **options):
    """Starts a command; `options` are those of `environment`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command)], cwd=cwd, env=environment(**options), **pipes)


def finish(process, status=0):
    """Waits for a process to end with `status`; returns what it printed, as `out` and `err`."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, f"{process.args}\n{out}\n{err}"
    return out, err


def execute(notebook, **variables):
    """Executes `notebooks/<notebook>.ipynb`; returns what it printed, and the number of its pictures."""
    nodes = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4)
    variables = environment(MPLBACKEND="module://matplotlib_inline.backend_inline", **variables)
    nbclient.NotebookClient(nodes, timeout=300).execute(cwd=str(ROOT / "notebooks"), env=variables)
    outputs = [output for cell in nodes.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


CHANGES = """

full = get_config


def get_config():
    config = full()
    for path, value in {changes}.items():
        *groups, last = path.split(".")
        group = config
        for key in groups:
            group = group[key]
        group[last] = value
    return config
"""


def write_config(path, name, changes):
    """Writes the file of a config that differs from `configs/<name>.py` in values named by paths."""
    path.write_text((ROOT / "configs" / f"{name}.py").read_text() + CHANGES.format(changes=changes))
