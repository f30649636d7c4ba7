"""Scripts in processes of their own."""

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile

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


# Importing takes longer than many scripts, and so does leaving Python. So one process imports what all scripts do, and
# each is a fork of it.
SERVER = """
import json, os, runpy, signal, sys, traceback
import posterior_matching.cli, sklearn.datasets, tensorflow_datasets
for line in sys.stdin:
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    folder, variables, out, err, *sys.argv = json.loads(line)
    os.dup2(os.open(out, os.O_WRONLY), 1), os.dup2(os.open(err, os.O_WRONLY), 2)
    os.chdir(folder)
    os.environ.update(variables)
    sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))
    signal.alarm(600)
    status = 70
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)
"""


@functools.cache
def _server():
    variables = environment()
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # Python would leave more behind for a user
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    server = subprocess.Popen([sys.executable, "-c", SERVER], env=variables, **pipes)
    atexit.register(server.communicate)
    return server


def run_script(script, *arguments, cwd=ROOT, status=0, **variables):
    """Runs `<script>.py`, of the repository or at an absolute path; returns what it printed, as `out` and `err`."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        case = [str(cwd), variables, out.name, err.name, str(ROOT / f"{script}.py"), *map(str, arguments)]
        print(json.dumps(case), file=_server().stdin, flush=True)
        found, printed = int(_server().stdout.readline()), (out.read(), err.read())
    assert found == status, f"{script} {arguments}\n{printed[0]}\n{printed[1]}"
    return printed


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
