"""A Griffe extension: docstrings are written for ``help()`` and Sphinx, the site reads Markdown."""

import re

from griffe import Extension

from deepopt.optim.flags import with_flags

MATH = re.compile(r"^( *)\.\. math::(.*)\n((?:\1 +.*\n?|[ ]*\n)*)", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|data|mod):`~?([^`]+)`")
INLINE_MATH = re.compile(r":math:`([^`]+)`")
LITERAL_BLOCK = re.compile(r"::\n(?=\s*\n|\s+\S)")


def as_markdown(text: str) -> str:
    """Formulas, cross-references and literal blocks of reStructuredText as Markdown."""
    text = MATH.sub(_formula, text + "\n")
    text = INLINE_MATH.sub(lambda match: f"\\({match[1]}\\)", text)
    text = ROLE.sub(lambda match: f"`{match[1]}`", text)
    return LITERAL_BLOCK.sub(":\n\n", text).rstrip("\n")


def _formula(match: re.Match[str]) -> str:
    indent, first, rest = match.groups()
    lines = [line.strip() for line in [first, *rest.splitlines()] if line.strip()]
    formula = " ".join(lines)
    if "&" in formula or r"\\" in formula:
        formula = rf"\begin{{aligned}} {formula} \end{{aligned}}"
    return f"{indent}\\[ {formula} \\]\n\n"


class Markdown(Extension):
    """Rewrites the docstring of every object that Griffe has found."""

    def on_object(self, *, obj, **_: object) -> None:
        """Called once for each object."""
        if obj.docstring and "\\]" not in obj.docstring.value:
            obj.docstring.value = as_markdown(with_flags(obj.docstring.value))
