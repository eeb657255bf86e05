"""Run the notebooks of examples/ and keep what they show: `make notebooks`, after `make demo`."""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def main(names: list[str]) -> None:
    """Run the notebooks of these names, or all; what says when and where they ran is left out."""
    for path in [EXAMPLES / name for name in names] or sorted(EXAMPLES.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        place = {"metadata": {"path": str(EXAMPLES)}}
        NotebookClient(notebook, timeout=None, record_timing=False, resources=place).execute()
        notebook.metadata.language_info = {"name": "python"}
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = together(cell.outputs)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


def together(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs without what goes to stderr, and with each run of printed lines as one."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
            if "image/png" in output.data:
                output.data["image/png"] = in_few_colors(output.data["image/png"])
        elif output.name == "stdout":
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
            else:
                kept.append(output)
    return kept


def in_few_colors(png: str) -> str:
    """A picture in 128 colors, a third of the size: notebooks are committed with their pictures."""
    small = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


if __name__ == "__main__":
    main(sys.argv[1:])
