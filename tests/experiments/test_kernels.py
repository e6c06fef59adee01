"""A notebook that is run as a batch: its kernel is a fork, and says what a terminal is to show."""

import subprocess
import sys

import nbformat

BAR = "from tasft_lib.storage import files\nfor _ in files.progress_bar(range(3), progress=True, desc='a bar'): pass"
CELLS = [BAR, "import multiprocessing\nprint(multiprocessing.current_process().name)"]
BATCH = """
import sys, papermill
from tasft_lib.experiments import kernels, reproduce
if __name__ == "__main__":
    kernels.fork_kernels()
    options = {"kernel_name": "python3", "progress_bar": False, "stderr_file": reproduce._Named("safety")}
    papermill.execute_notebook(sys.argv[1], sys.argv[2], **options)
"""


def test_bars_reach_the_terminal_as_text_and_nothing_else_does(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    nbformat.write(notebook, tmp_path / "in.ipynb")
    (tmp_path / "batch.py").write_text(BATCH)
    command = [sys.executable, tmp_path / "batch.py", tmp_path / "in.ipynb", tmp_path / "out.ipynb"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "safety: a bar: 100%" in ended.stderr and not ended.stdout
    lines = [line for line in ended.stderr.splitlines() if line and not line.startswith("safety: a bar: ")]
    assert not lines, lines
    (named,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[1].outputs
    assert named.text == "notebook kernel\n"
