"""Sphinx configuration. The pages are Markdown; docstrings are Google style with Unicode mathematics."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import torch_adapted_gd
from torch_adapted_gd import collapse, lightning, plotting
from torch_adapted_gd.collapse import metrics
from torch_adapted_gd.lightning import cli

project = "torch_adapted_gd"
author = "The torch_adapted_gd authors"
version = release = torch_adapted_gd.__version__
html_title = project
smartquotes_action = "D"  # dashes; a prime is a prime

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_math_renderer = "mathml"  # below: no script to fetch, and what is no LaTeX is an error of the build

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "literal"  # `name` in docstrings; public names are linked, below
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]

PUBLIC = {
    text: f"{module.__name__}.{name}"
    for module in (torch_adapted_gd, collapse, metrics, lightning, cli)
    for name in module.__all__
    for text in (name, f"{module.__name__.removeprefix('torch_adapted_gd.')}.{name}")
} | {
    text: f"{plotting.__name__}.{name}"
    for name in vars(plotting)
    if name.startswith("plot_")
    for text in (name, f"plotting.{name}")
}

_LITERAL = re.compile(r"(``.+?``|`[^`]+`)")
_ENUMERATOR = re.compile(r"(^ *|: )([A-Za-z])\.(?= |$)")  # "num_classes: K." is no list


def _escaped(line: str) -> str:
    """|x| is a norm and * a star, but for what is literal; and a symbol before a full stop is no number of a list."""
    line = _ENUMERATOR.sub(r"\1\2\\.", line)
    return "".join(
        part if index % 2 else part.replace("|", r"\|").replace("*", r"\*") for index, part in enumerate(_LITERAL.split(line))
    )


def _table(rows: list[str]) -> list[str]:
    """A Markdown table as a list-table; cells may have a | without spaces around it."""
    out = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows[:1] + rows[2:]:
        cells = row.strip().removeprefix("| ").removesuffix(" |").split(" | ")
        out += [f"   {'  -' if column else '* -'} {_escaped(cell)}" for column, cell in enumerate(cells)]
    return [*out, ""]


def as_rest(_app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """What docstrings have of Markdown, as reStructuredText: tables, norms, equations that are indented."""
    out: list[str] = []
    section = ""  # of Google style
    literal = False  # in an indented equation
    rest = [*lines, "", ""]
    while rest:
        line = rest.pop(0)
        if line.startswith("|") and rest[0].startswith("|---"):
            table = [line]
            while rest[0].startswith("|"):
                table.append(rest.pop(0))
            out += _table(table)
            continue
        if line and not line.startswith(" "):
            section, literal = line, False
        if line.startswith("    ") and not literal and not section.endswith("Example:") and out and not out[-1]:
            literal = not re.fullmatch(r"[A-Z]\w+:", section)
            out += ["::", ""] if literal else []
        out.append(line if literal or section == "Example:" else _escaped(line))
    lines[:] = out


class LinkPublicNames(SphinxTransform):
    """Each public name that is written as code, in a page or a docstring, leads to its entry."""

    default_priority = 700

    def apply(self, **_kwargs: Any) -> None:
        """Wrap them."""
        for node in list(self.document.findall(nodes.literal)):
            target = PUBLIC.get(node.astext())
            if target is None or isinstance(node.parent, (nodes.title, nodes.reference, addnodes.pending_xref)):
                continue
            link = addnodes.pending_xref(
                "", refdomain="py", reftype="obj", reftarget=target, refexplicit=True, refwarn=True, refdoc=self.env.docname
            )
            node.replace_self(link)
            link += node


def _inline_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block_math(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math" style="overflow-x: auto">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Add these to Sphinx."""
    app.connect("autodoc-process-docstring", as_rest, priority=400)  # before napoleon
    app.add_transform(LinkPublicNames)
    app.add_html_math_renderer("mathml", inline_renderers=(_inline_math, None), block_renderers=(_block_math, None))
