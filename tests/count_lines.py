"""How much there is to read: lines, code, comments, docstrings and the longest function of Python sources.

    python tests/count_lines.py                      # the scripts and modules of this repository
    python tests/count_lines.py path/to/nanoGPT      # the same of another one, its subfolders included

A line of code holds anything but white space, a comment or a docstring. A function counts from its `def` to its end.
"""
import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def count(text):
    """A source's {"lines", "code", "comments" (lines that have one), "docstrings" (lines), "longest" (function)}."""
    nodes = list(ast.walk(ast.parse(text)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    docs = [node.body[0] for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None]
    docstrings = {line for doc in docs for line in range(doc.lineno, doc.end_lineno + 1)}
    comments, code = set(), set()
    silent = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in silent:
            code.update(range(token.start[0], token.end[0] + 1))
    return {"lines": len(text.splitlines()), "code": len(code - docstrings), "comments": len(comments),
            "docstrings": len(docstrings), "longest": max((f.end_lineno - f.lineno + 1 for f in functions), default=0)}


def total(paths):
    """The same of several files together."""
    counts = [count(Path(path).read_text()) for path in paths]
    return {key: (max if key == "longest" else sum)(c[key] for c in counts) for key in counts[0]}


if __name__ == "__main__":
    print("| sources | files | lines | code | with a comment | of docstrings | longest function |")
    print("|---|---|---|---|---|---|---|")
    for folder in sys.argv[1:] or [ROOT]:
        paths = sorted(ROOT.glob("*.py") if folder is ROOT else Path(folder).rglob("*.py"))
        if not paths:
            sys.exit(f"error: {folder} holds no Python source: give the folder of a repository")
        print(f"| {Path(folder).name} | {len(paths)} | {' | '.join(f'{n:,}' for n in total(paths).values())} |")
