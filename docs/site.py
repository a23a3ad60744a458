"""What mkdocs needs to make a site of documents that are written for GitHub (a hook of mkdocs.yml).

Pages outside docs/ are brought in under their own names, links are turned to where a page or file is on the site, and
equations become MathML, which browsers draw without a script.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]
OUTSIDE = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "launch/README.md",
)  # beside docs/*.md
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
EQUATION = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/, and the files that pages link to there."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(REPOSITORY / name).read_text(encoding="utf-8")))
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            path = target_of(page.src_uri, target)
            if path.startswith("benchmarks/") and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, content=(REPOSITORY / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links and equations into the site's."""
    here = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        path = target_of(page.file.src_uri, found[1]).removeprefix("docs/")
        return f"]({posixpath.relpath(path, here or '.')}"

    return LINK.sub(link, EQUATION.sub(lambda found: equation(found[1]), markdown))


def target_of(page: str, target: str) -> str:
    """The path in the repository that a page of the site, by its path there, links to."""
    source = page if page in OUTSIDE else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def equation(latex: str) -> str:
    """MathML of an equation. latex2mathml knows `array` and no `aligned`; a small fraction is too small to read."""
    latex = latex.replace(r"\tfrac", r"\frac")
    latex = latex.replace(r"\begin{aligned}", r"\begin{array}{rlll}").replace(
        r"\end{aligned}", r"\end{array}"
    )
    return f'<div class="equation">{convert(latex, display="block")}</div>'
