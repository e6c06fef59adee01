"""The widgets in a real browser on a real JupyterLab: a card is labelled by mouse and keys, a table shows on a click.

Skipped where there is no chromium, as in CI.
"""

import json
import os
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from browser import browser_page

CELLS = [
    """\
import pandas as pd
from tasft_lib.evaluation.side_by_side import of_table, side_by_side
from tasft_lib.experiments.audit_answers import Card, Session, draw, label_file
from tasft_lib.reporting.answers import interactive

verdicts = ["harmful", "safe", "refusal"] * 10
judged = pd.DataFrame({"verdict": verdicts, "judge": "j", "benchmark": "b", "kind": "toxic"})
judged["prompt"] = [f"<b>how</b> do I quorb the {i} zorvexes of my house" for i in range(30)]
judged["response"] = [f"you glimjack them <img src=x onerror=alert(1)> {i} times" for i in range(30)]""",
    "Card(Session(draw(judged, 2, 0), label_file('me')))",
    "interactive(side_by_side({'sft': of_table(judged), 'emd': of_table(judged[:20])}))",
]


@pytest.fixture
def lab(tmp_path):
    """(folder, address) of a JupyterLab with a notebook of `CELLS`; what it runs writes to the folder."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed (tasft[notebooks])")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "widgets.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"TASFT_RUNS": str(tmp_path), "HOME": str(tmp_path)}
    options = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=t",
        "--expose-app-in-browser",
    ]
    command = [sys.executable, "-m", "jupyterlab", *options, "--LabApp.news_url=None", f"--notebook-dir={tmp_path}"]
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urlopen(f"{address}/api?token=t").read()
                break
            except URLError:
                assert server.poll() is None, (tmp_path / "lab.log").read_text()[-2000:]
                time.sleep(0.1)
        yield tmp_path, address
    finally:
        server.terminate()
        server.wait()


def test_a_person_labels_and_reads_in_jupyterlab(lab, tmp_path):
    folder, address = lab
    with browser_page(tmp_path / "profile", 1200, 1400) as page:
        page.go(f"{address}/lab/tree/widgets.ipynb?token=t")
        panel = "[...(window.jupyterapp?.shell.widgets('main') ?? [])][0]"
        page.wait(f"{panel}?.context?.isReady && {panel}.sessionContext.session?.kernel?.status == 'idle'", 120)
        page.run("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        outputs = "[...document.querySelectorAll('.jp-OutputArea-output')].map((o) => o.innerText).join(' ')"
        page.wait(f"{outputs}.includes('0 of 6 labelled') && {outputs}.includes('1 to 10 of 30')", 120)
        pictures = os.environ.get("TASFT_PICTURES")
        if pictures:
            page.picture(folder / "before.png")
        assert "glimjack them" not in page.run(outputs) and "zorvexes" not in page.run(outputs)

        button = "[...document.querySelectorAll('button')].find((b) => b.innerText.includes('{}')).click()"
        page.run(button.format("show (space)"))
        page.wait(f"{outputs}.includes('you glimjack them <img src=x')")
        page.run(button.format("harmful (h)"))
        page.wait(f"{outputs}.includes('1 of 6 labelled')")
        page.run("document.querySelector('input[placeholder^=click]').focus()")
        for done, key in ((1, " "), (2, "s"), (2, " "), (3, "?")):
            page.press(key)
            page.wait(f"{outputs}.includes('{done} of 6 labelled')")
            if key == " ":
                page.wait(f"{outputs}.includes('you glimjack them')")
        labels = [json.loads(line)["verdict"] for line in (folder / "audits" / "me.jsonl").read_text().splitlines()]
        assert labels == ["harmful", "safe", "unscored"]

        assert page.run("document.querySelectorAll('.jp-OutputArea-output img').length") == 0, "answers are no HTML"
        page.run("[...document.querySelectorAll('td')].find((cell) => cell.innerText.includes('10 words')).click()")
        page.wait(f"{outputs}.includes('you glimjack them')")
        if pictures:
            page.picture(folder / "after.png")
            for name in ("before", "after"):
                os.replace(folder / f"{name}.png", f"{pictures}/{name}.png")
        page.run(f"{panel}.context.save()")
        saved = nbformat.read(folder / "widgets.ipynb", as_version=4)
        assert len(saved.cells[2].outputs) == 1
        held = json.dumps([saved.metadata, [cell.outputs for cell in saved.cells]])
        assert "glimjack" not in held and "zorvexes" not in held, "a saved notebook holds no text"
        outside = [url for url in page.asked if not url.startswith((address, "data:", "blob:", "about:", "chrome"))]
        assert outside == [], "nothing leaves the machine"
