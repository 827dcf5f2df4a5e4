"""MkDocs hooks: the pages of docs/ link to any file of the repository, on GitHub and on the site.

A link from a page to a file outside docs/, such as ``../deepopt/optim/m3.py``, works in a checkout
and on GitHub as it stands. The site gets a page for every such file, with its source or its
Markdown. If the text of a link to a Python file is the name of a class or function in that file,
the link leads to its definition. A link to a file or a name that does not exist fails the build.
"""

import ast
import json
import posixpath
import re
from pathlib import Path
from urllib.parse import quote

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
SOURCES = "source/"
"""Where the site keeps the pages of files outside docs/."""
LANGUAGES = {".py": "python", ".cpp": "cpp", ".cu": "cpp", ".h": "cpp", ".toml": "toml"}
LINK = re.compile(r"(?<!\\)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2", re.DOTALL | re.MULTILINE)
WHOLE_PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
"""Pages at the root that the navigation may name, so that they are there without a link."""


def on_files(files, config):
    """Add a page for every file that pages link to, and for what those link to in turn."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            uri = file.src_uri.removesuffix(".ipynb") + ".md"
            text = notebook_as_markdown(Path(file.abs_src_path))
            files.append(File.generated(config, uri, content=text))
    waiting = [f"docs/{page.src_uri}" for page in files.documentation_pages()] + [*WHOLE_PAGES]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        uri = page_of(path)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=text_of(path)))
        if path.endswith(".md") and (ROOT / path).exists():
            waiting += [found for found in targets(path) if is_page(found)]
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links of a page to those of the site."""
    path = repository_path(page.file.src_uri)
    if not path.endswith((".md", ".ipynb")):
        return markdown

    def rewrite(match):
        text, target = match["text"], match["target"]
        if is_elsewhere(target):
            return match[0]
        file, _, anchor = target.partition("#")
        found = resolve(path, file)
        name = text.strip("`").removesuffix("()")
        if found.endswith(".py") and name.isidentifier():
            check_defined(found, name)
            anchor = name
        uri = page_of(found) if is_page(found) else found.removeprefix("docs/")
        link = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"[{text}]({quote(link)}{'#' + anchor if anchor else ''})"

    return outside_of_code(markdown, lambda text: LINK.sub(rewrite, text))


def is_elsewhere(target):
    """Whether a link leads to another site or to a place on its own page."""
    return target.startswith("#") or ":" in target.split("/")[0]


def outside_of_code(markdown, change):
    """Change the Markdown between fenced blocks of code."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def targets(path):
    """The files and folders of the repository that a Markdown file links to."""
    found = []

    def note(text):
        links = (match["target"] for match in LINK.finditer(text))
        found.extend(resolve(path, x.partition("#")[0]) for x in links if not is_elsewhere(x))
        return text

    outside_of_code((ROOT / path).read_text(), note)
    return found


def resolve(path, target):
    """The path, from the root of the repository, that a link in the file ``path`` leads to."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    if not (ROOT / found).exists():
        raise PluginError(f"{path} links to {target}, which does not exist")
    return found


def is_page(path):
    """Whether the site shows a file as a page; pictures and data are offered as they are."""
    return not (path.startswith("docs/") and path.endswith((".png", ".jsonl", ".json")))


def page_of(path):
    """The page of the site that shows a file or folder of the repository."""
    if (ROOT / path).is_dir() and (ROOT / path / "index.md").exists():
        path += "/index.md"
    if path.startswith("docs/") and path.endswith((".md", ".ipynb")):
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    # MkDocs takes a README for the index of its folder, which would give two pages one address.
    path = path.replace("README.md", "readme.md")
    path = re.sub(r"(^|/)\.", r"\1", path)  # it leaves out what begins with a dot
    return SOURCES + path + ("" if path.endswith(".md") else ".md")


def repository_path(uri):
    """The file of the repository that a page of the site shows."""
    if not uri.startswith(SOURCES):
        notebook = f"docs/{uri.removesuffix('.md')}.ipynb"
        return notebook if (ROOT / notebook).exists() else f"docs/{uri}"
    path = uri.removeprefix(SOURCES).replace("readme.md", "README.md")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def text_of(path):
    """The Markdown of the page for a file or folder."""
    file = ROOT / path
    if path.endswith(".md"):
        return file.read_text()
    if file.is_dir():
        names = sorted(f"{x.name}/" if x.is_dir() else x.name for x in file.iterdir())
        shown = [name for name in names if not name.startswith(("_", "."))]
        return "\n".join([f"# {path}/", "", *[f"- `{name}`" for name in shown]])
    language = LANGUAGES.get(file.suffix, "text")
    parts, lines = [f"# {path}"], file.read_text().splitlines()
    starts = {0: "", **(definitions(path) if file.suffix == ".py" else {})}
    for start, end in zip(starts, [*list(starts)[1:], len(lines)], strict=True):
        if starts[start]:
            parts.append(f"## {starts[start]} {{ #{starts[start]} }}")
        code = "\n".join(lines[start:end]).strip("\n")
        if code:
            parts.append(f'````{language} linenums="{start + 1}"\n{code}\n````')
    return "\n\n".join(parts) + "\n"


def definitions(path):
    """The classes and functions of a Python file, by the line on which they start."""
    found = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min([node.lineno, *(x.lineno for x in node.decorator_list)])
            found[first - 1] = node.name
    return found


def check_defined(path, name):
    """Fail unless a Python file defines this class or function."""
    if name not in definitions(path).values():
        raise PluginError(f"{path} does not define {name}")


def notebook_as_markdown(path):
    """A notebook as a page: its text, its code, and the outputs that are stored with it."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output["data"]:
                image = "".join(output["data"]["image/png"]).replace("\n", "")
                parts.append(f'<img alt="output" src="data:image/png;base64,{image}">')
    return "\n\n".join(parts) + "\n"
