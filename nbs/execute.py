"""Run notebooks and store what teaches.

    make notebooks N="35_study tour"      # these; without N all of them, in order

Progress bars, warnings and live widgets are not stored; a notebook that fails stays as it was."""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from medxfer_nb.cli import WIDGET

HOME = Path(__file__).parent


def kept(output):
    "Whether an output belongs into the stored notebook."
    return output.get("name") != "stderr" and WIDGET not in output.get("data", {})


def execute(path):
    "Run one notebook in its folder and write it back."
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=1200, resources=dict(metadata=dict(path=str(path.parent)))).execute()
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if kept(o)]
    nb.metadata.pop("widgets", None)
    nbformat.write(nb, path)


def main():
    for name in sys.argv[1:] or [str(p.relative_to(HOME)) for p in sorted(HOME.glob("*.ipynb"))]:
        print(name, flush=True)
        execute((HOME / name).with_suffix(".ipynb"))


if __name__ == "__main__": main()
