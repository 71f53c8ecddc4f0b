"""Writes the pages that are made from the program: ``python -m docs.generate``. A test checks that they are up to date."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from cascadevlm.base import errors

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = (ROOT / "cascadevlm", ROOT / "backends" / "cascadevlm_backends")

ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.CascadeError)}


def command_line() -> str:
    """Every command with its help, in Markdown."""
    command = [
        sys.executable,
        "-m",
        "typer",
        "cascadevlm.cli",
        "utils",
        "docs",
        "--name",
        "cascadevlm",
        "--title",
        "Command line",
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() + "\n"


def all_errors() -> str:
    """A table of the messages of every error of the packages, with what to do."""
    rows: dict[str, set[tuple[str, str]]] = {}
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            for name, message, hint in raised(ast.parse(path.read_text(encoding="utf-8"))):
                rows.setdefault(name, set()).add((message, hint))
    parts = [
        "# All errors\n",
        "This page is made from the program: `python -m docs.generate`. An ellipsis (…) stands for what differs between cases.",
        "Search this page for a part of the message that you see.\n",
    ]
    for name in sorted(rows):
        parts += [f"## {name}\n", f"{summary(name)}\n", "| message | what to do |", "|---|---|"]
        parts += [f"| {cell(message)} | {cell(hint) or 'as the message says'} |" for message, hint in sorted(rows[name])]
        parts.append("")
    return "\n".join(parts).strip() + "\n"


def raised(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Class, message and hint of every error that is made with a literal message, or one that has a name above."""
    named: dict[str, str] = {}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.Call)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            named = {name: text for name, text in named.items() if name.isupper()}
        elif isinstance(node, ast.Assign):
            named |= {target.id: literal(node.value, named) for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
            hints = [literal(keyword.value, named) for keyword in node.keywords if keyword.arg == "hint"]
            if message := literal(node.args[0], named):
                yield node.func.id, message, hints[0] if hints else ""


def literal(node: ast.expr, named: Mapping[str, str]) -> str:
    """The text of a string, with an ellipsis for everything that is filled in.

    Args:
        node: the expression.
        named: the texts of variables.
    """
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name):
            return named.get(name, "")
        case ast.JoinedStr(values=values):
            return "".join(str(value.value) if isinstance(value, ast.Constant) else "…" for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return literal(left, named) + literal(right, named)
        case ast.IfExp(body=body, orelse=orelse):
            return " / ".join(filter(None, (literal(body, named), literal(orelse, named))))
    return ""


def summary(name: str) -> str:
    """The first line of the docstring of an error."""
    return (getattr(errors, name).__doc__ or "").splitlines()[0].split(";")[0].rstrip(".") + "."


def cell(text: str) -> str:
    """A text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


PAGES = {"command-line.md": command_line, "errors.md": all_errors}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
