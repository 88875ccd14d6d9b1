"""Count the lines of code of every room: ``python tests/count_lines.py [FOLDER]`` (default: hpc_cpd).

A line counts where something of a statement stands on it. Blank lines, comments, docstrings and other strings that
stand alone do not. On another commit: ``git worktree add /tmp/before COMMIT``, then give ``/tmp/before/hpc_cpd``.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """The number of lines of a Python file, given as text, on which there is code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "hpc_cpd")
    rooms: Counter[str] = Counter()
    for path in folder.rglob("*.py"):
        rooms[path.relative_to(folder).parts[0].removesuffix(".py")] += code_lines(path.read_text())
    for room, count in sorted(rooms.items()):
        print(f"{count:6,}  {room}")
    print(f"{sum(rooms.values()):6,}  in all")


if __name__ == "__main__":
    main()
