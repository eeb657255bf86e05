"""Pages of the documentation that are made of the project itself whenever it is built.

A hook of MkDocs. A folder in `nav` of mkdocs.yml stands for the pages made here:

    commands/   a page for each command of `vae3d.cli`, from its `--help`
    python/     a page for each package, from the docstrings of its public names
    notebooks/  the notebooks of examples/, with their outputs as committed
    files/      what pages link to outside of docs/: recipes, scripts, CONTRIBUTING
"""

import ast
import base64
import io
import json
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from vae3d.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vae3d", "loaders", "vae3d.losses", "vae3d.inference", "vae3d.stage2")
ROOMS = {  # packages without an `__all__`; a star stands for all classes of a file
    "vae3d.models": (
        *("blocks.*", "downsample.*", "upsample.*", "norm.*", "attention.*", "posterior.*"),
        *("linear_code.*", "presets.*"),
    ),
    "vae3d.exact": ("executor.encode_exact", "executor.decode_exact"),
    "vae3d.training": (
        *("checkpoint.load_checkpoint", "checkpoint.find_checkpoint", "options.*"),
        *("linear_code.fit_linear_code", "augment.Augmentation", "lit.LitVAE"),
    ),
    "vae3d.tracking": (
        *("media.three_planes", "media.scroll_frames", "media.write_png", "media.write_gif"),
        *("media.write_mp4", "probes.LatentProbes"),
    ),
}
LANGUAGES = {".yaml": "yaml", ".py": "python", ".sbatch": "bash", "Dockerfile": "docker"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # the address of [text](address#anchor)
Pages = dict[str, str | bytes]  # by their place below docs/


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and put them where `nav` names their folder."""
    written = {f.src_uri: f.content_string for f in files.documentation_pages()}
    made = command_pages() | python_pages() | notebook_pages()
    made |= file_pages(written | {uri: str(text) for uri, text in made.items() if is_page(uri)})
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    config.nav = [with_folders(entry, list(made)) for entry in config.nav or []]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/ to the pages made of what they link to."""
    here = page.file.src_uri
    return LINK.sub(lambda link: link_on_site(here, link[1]), markdown)


def is_page(uri: str) -> bool:
    """Whether a file is written in Markdown."""
    return uri.endswith(".md")


def with_folders(entry: dict | str, made: list[str]) -> dict | str:
    """An entry of `nav` with the pages of a folder in the place of the folder's name."""
    if isinstance(entry, dict):
        (title, pages), *_ = entry.items()
        if isinstance(pages, str) and pages.endswith("/"):
            return {title: [uri for uri in made if uri.startswith(pages) and is_page(uri)]}
    return entry


def source_of(uri: str) -> str:
    """The file of the repository that a page of the site shows."""
    if uri.startswith("files/"):
        path = uri.removeprefix("files/")
        return path if (ROOT / path).is_file() else path.removesuffix(".md")
    return f"docs/{uri}"


def link_on_site(here: str, link: str) -> str:
    """What a link of a page, relative in the repository, is on the site."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(here)), link))
    if path.startswith("docs/"):
        place = path.removeprefix("docs/")
    elif match := re.fullmatch(r"examples/(\w+)\.ipynb", path):
        place = f"notebooks/{match[1]}.md"
    else:
        place = f"files/{path}" if is_page(path) else f"files/{path}.md"
    return posixpath.relpath(place, posixpath.dirname(here) or ".")


def file_pages(pages: dict[str, str]) -> Pages:
    """Pages of the files outside docs/ that pages link to, and of those that these link to."""
    made: Pages = {}
    left = list(pages.items())
    while left:
        here, text = left.pop()
        links = (link_on_site(here, link[1]) for link in LINK.finditer(text))
        for link in links:
            uri = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
            if uri.startswith("files/") and uri not in made:
                made[uri] = file_page(ROOT / source_of(uri))
                left.append((uri, str(made[uri])))
    return made


def file_page(path: Path) -> str:
    """A file of the repository as a page."""
    if is_page(path.name):
        return path.read_text()
    name = path.relative_to(ROOT).as_posix()
    language = LANGUAGES.get(path.suffix or path.name, "text")
    return f"# {name}\n\n````{language}\n{path.read_text().rstrip()}\n````\n"


def command_pages() -> Pages:
    """A page for each command, and one that lists them."""
    rows = "".join(f"| [{name}]({name}.md) | {what} |\n" for name, (_, what) in COMMANDS.items())
    index = (
        "# Commands\n\nMade of `vae3d COMMAND --help`. Any option may stand in a YAML file, which"
        " `--config` names; options on the command line override it, later ones override earlier"
        " ones. Options in square brackets take YAML: `--patch_size '[64,64,64]'`. Where an option"
        " takes a class, `--model.help MaisiVAE` tells the options of that class.\n\n"
        f"| command | what it does |\n| --- | --- |\n{rows}"
    )
    return {"commands/index.md": index} | {
        f"commands/{name}.md": f"# vae3d {name}\n\n" + as_markdown(help_of(name))
        for name in COMMANDS
    }


def help_of(command: str) -> str:
    """What `vae3d COMMAND --help` prints, each option's help on one line."""
    said = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="10000"), redirect_stdout(said), suppress(SystemExit):
        main([command, "--help"])
    return said.getvalue()


def as_markdown(text: str) -> str:
    """A help text as a page: its introduction, and a list of definitions for each group."""
    start = re.search(r"^(positional arguments|options):$", text, re.MULTILINE)
    assert start, text
    usage, _, introduction = text[: start.start()].partition("\n")
    lines = [line if line.startswith("    ") else plain(line) for line in introduction.splitlines()]
    blocks = re.sub(r"^(\S.*)\n(?=    )", r"\1\n\n", "\n".join(lines), flags=re.M)  # code
    parts = [f"```\n{usage.removeprefix('usage: ')}\n```\n\n{blocks}\n"]
    for heading, body in re.findall(r"^(\S.*):\n((?:  .*\n|\n)+)", text[start.start() :], re.M):
        parts.append(f"## {heading[0].upper()}{heading[1:]}\n")
        parts += [definition(*option) for option in options(body)]
    return "\n".join(parts)


def options(group: str) -> Iterator[tuple[str, str]]:
    """Each option of a group, as the help shows it, with what it says of it."""
    for entry in re.findall(r"^  \S.*\n(?: {3,}.*\n)*", group, re.MULTILINE):
        name, _, said = re.sub(r"\n\s+|(?<=\S)  +", "\0", entry.strip(), count=1).partition("\0")
        if name != "-h, --help":
            yield "".join(filter(str.isprintable, name)), " ".join(said.split())


def definition(name: str, said: str) -> str:
    """An option as an entry of a list of definitions: what it is, then type and default."""
    what, _, kind = said.partition("(required, type: ") if "(required," in said else ("", "", "")
    if kind:
        facts = f"required, `{kind[:-1]}`"
    else:
        what, _, kind = said.rpartition("(type: ")
        what, kind = (what, kind) if what else (kind, "")
        kind, _, default = kind.removesuffix(")").partition(", default: ")
        default, _, known = default.partition(", known subclasses: ")
        facts = f"`{kind}`, by default `{default or '(empty)'}`" if kind else ""
        facts += f", known: {', '.join(f'`{name}`' for name in known.split(', '))}" if known else ""
    anchor = re.sub(r"\W+", "-", name.split()[0]).strip("-")
    return f"`{name}`{{ #{anchor} }}\n:   {plain(what.strip())}  \n    {facts}\n"


def plain(text: str) -> str:
    """A text in which Markdown and HTML see nothing but `code`."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*\[\]])", r"\\\1", p).replace("<", "&lt;") for p in parts[::2]]
    return "`".join(parts)


def python_pages() -> Pages:
    """A page for each package; what several show stands on the first of them."""
    names = {package: names_of(package) for package in PACKAGES}
    names |= {
        package: [full for name in own for full in spelled_out(f"{package}.{name}")]
        for package, own in ROOMS.items()
    }
    pages: Pages = {}
    shown: set[str] = set()
    for package, own in names.items():
        what = (import_module(package).__doc__ or "").partition("\n")[0]
        full = f"    options:\n      show_root_full_path: {str(package in ROOMS).lower()}\n"
        entries = [f"::: {n}\n{full}" if n not in shown else f"- [`{n}`][{n}]\n" for n in own]
        pages[f"python/{package}.md"] = "\n".join([f"# {package}\n\n{what}\n", *entries])
        shown |= set(own)
    rows = "".join(f"- [{package}]({package}.md)\n" for package in names)
    return {"python/index.md": f"# Python\n\nMade of the docstrings.\n\n{rows}"} | pages


def names_of(package: str) -> list[str]:
    """Where the public names of a package are defined; it opens its rooms on first use."""
    module = import_module(package)
    homes = getattr(module, "_HOMES", None) or module._HOME
    full = (f"{homes[name]}.{name}" for name in module.__all__)
    return [name if name.startswith("vae3d.") else f"{package}.{name}" for name in full]


def spelled_out(name: str) -> list[str]:
    """A name, or all public classes of a file, which is not imported: it may want an extra."""
    module, _, star = name.rpartition(".")
    if star != "*":
        return [name]
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    return [f"{module}.{name}" for name in classes if not name.startswith("_")]


def notebook_pages() -> Pages:
    """The notebooks of examples/, pictures beside them."""
    pages: Pages = {}
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        parts = []
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            source = "".join(cell["source"])
            parts.append(source if cell["cell_type"] == "markdown" else fenced("python", source))
            for at, output in enumerate(cell.get("outputs", ())):
                shown, picture = output_of(output, f"{path.stem}_{number}_{at}")
                parts.append(shown)
                pages |= {f"notebooks/{name}": data for name, data in picture.items()}
        pages[f"notebooks/{path.stem}.md"] = "\n\n".join(parts) + (
            f"\n\n---\n\nThis page is the notebook `examples/{path.name}`."
        )
    return pages


def fenced(language: str, text: str) -> str:
    """A text as a block of code."""
    return f"```{language}\n{text.rstrip()}\n```"


def output_of(output: dict, name: str) -> tuple[str, Pages]:
    """An output of a cell in Markdown, and the picture that it shows."""
    if "text" in output:
        return fenced("text", "".join(output["text"])), {}
    data = output["data"]
    for kind in ("png", "gif", "jpeg"):
        if f"image/{kind}" in data:
            file = f"{name}.{kind}"
            return f"![output]({file})", {file: base64.b64decode("".join(data[f"image/{kind}"]))}
    if "text/html" in data:
        return "".join(data["text/html"]), {}
    return fenced("text", "".join(data["text/plain"])), {}
