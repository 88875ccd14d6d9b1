"""One Python function written for one environment, turned into one that serves N environments at once.

Meta-World's rewards are short scalar programs: arithmetic on vectors of three, a few branches, no loops. `vectorize`
rewrites the source of such a function so that it runs on arrays whose *last* axis is the environment: a number becomes
[N], a vector [k, N]. A branch becomes a selection, `and` a logical and, a comparison with None a question to every
row. So upstream's own text stays the only place where a reward is written, and Python is paid for once per batch.

What cannot be rewritten honestly (a loop over data, a return inside a branch) raises VectorizeError at once, never when
it runs. The arithmetic is upstream's in upstream's order; `vector_ops` holds what the names mean.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Any


class VectorizeError(Exception):
    """The function uses a construct that has no meaning for many environments at once."""


def vectorize(function: FunctionType, names: Mapping[str, Any], constants: Mapping[str, str]) -> FunctionType:
    """`function` for N environments; `names` are its globals: those of `vector_ops` and the vectorized callees.

    `constants`: settings known beforehand, as text of an expression and the text of its value; a branch that one of
    them decides is resolved now.

    Raises VectorizeError: the source is missing, or holds a construct that is not supported.
    """
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise VectorizeError(f"the source of {function!r} is missing") from error
    tree = ast.parse(source)
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise VectorizeError(f"{function!r} is no plain function")
    definition.decorator_list, definition.returns = [], None
    for argument in [*definition.args.args, *definition.args.kwonlyargs]:
        argument.annotation = None
    tree = _Fixed(constants).visit(tree)
    _Rewriter(f"{function.__qualname__}").function(definition)
    ast.fix_missing_locations(tree)
    module = compile(tree, f"<vectorized {function.__qualname__}>", "exec")
    code = next(part for part in module.co_consts if isinstance(part, CodeType) and part.co_name == definition.name)
    vectorized = FunctionType(code, dict(names), definition.name, function.__defaults__)
    vectorized.__kwdefaults__ = function.__kwdefaults__
    return vectorized


class _Fixed(ast.NodeTransformer):
    """Keeps only the branch that a constant decides."""

    def __init__(self, constants: Mapping[str, str]) -> None:
        self.constants = constants

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        test = node.test
        if isinstance(test, ast.Compare) and ast.unparse(test.left) in self.constants:
            verdict = ast.unparse(test.comparators[0]) == self.constants[ast.unparse(test.left)]
            if len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
                raise VectorizeError(f"{ast.unparse(test)} is not a plain equality")
            return node.body if verdict else node.orelse
        return node


class _Rewriter:
    """Rewrites the statements of one function in place."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.masks = 0

    def function(self, definition: ast.FunctionDef) -> None:
        arguments = {argument.arg for argument in [*definition.args.args, *definition.args.kwonlyargs]}
        # a name that is first assigned inside a branch must exist outside it
        branched = [
            target.id
            for branch in ast.walk(definition)
            if isinstance(branch, ast.If)
            for target in ast.walk(branch)
            if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store) and target.id not in arguments
        ]
        begin = [_assign(name, ast.Constant(None)) for name in dict.fromkeys(branched)]
        definition.body = [*begin, *self.block(definition.body, None)]

    def block(self, statements: list[ast.stmt], mask: str | None) -> list[ast.stmt]:
        return [new for statement in statements for new in self.statement(statement, mask)]

    def statement(self, node: ast.stmt, mask: str | None) -> list[ast.stmt]:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or isinstance(node, ast.Assert | ast.Delete | ast.Pass):
            return []
        if isinstance(node, ast.If):
            return self.branch(node, mask)
        if isinstance(node, ast.Return) and mask is None:
            node.value = _Expressions().visit(node.value) if node.value else None
            return [node]
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            return self.assignment(node.target, _Expressions().visit(node.value), mask)
        if isinstance(node, ast.AugAssign):
            loaded = ast.parse(ast.unparse(node.target), mode="eval").body
            return self.assignment(node.target, ast.BinOp(loaded, node.op, _Expressions().visit(node.value)), mask)
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            return self.assignment(node.targets[0], _Expressions().visit(node.value), mask)
        raise VectorizeError(
            f"{self.name}, line {node.lineno}: {type(node).__name__} is not supported: {ast.unparse(node)}"
        )

    def branch(self, node: ast.If, mask: str | None) -> list[ast.stmt]:
        if any(isinstance(inner, ast.Raise) for inner in node.body):
            return []  # upstream's check of its caller's arguments
        self.masks += 1
        yes, no = f"_yes{self.masks}", f"_no{self.masks}"
        result: list[ast.stmt] = [_assign(yes, _Expressions().visit(node.test))]
        if node.orelse:
            result.append(_assign(no, _call("_not", _name(yes))))
        for name, statements in ((yes, node.body), (no, node.orelse)):
            if statements:
                if mask is not None:
                    result.append(_assign(name, _call("_and", _name(mask), _name(name))))
                result.append(ast.If(_call("_any", _name(name)), self.block(statements, name) or [ast.Pass()], []))
        return result

    def assignment(self, target: ast.expr, value: ast.expr, mask: str | None) -> list[ast.stmt]:
        if mask is not None:
            if not isinstance(target, ast.Name | ast.Attribute | ast.Subscript):
                raise VectorizeError(f"{self.name}: several targets inside a branch: {ast.unparse(target)}")
            loaded = ast.parse(ast.unparse(target), mode="eval").body
            value = _call("_select", _name(mask), value, loaded)
        return [_assign(target, value)]


class _Expressions(ast.NodeTransformer):
    """`and`, `or`, `not`, chained comparisons, `is None`, conditional expressions and ``.item()``, for arrays."""

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        return _call("_and" if isinstance(node.op, ast.And) else "_or", *node.values)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        return _call("_not", node.operand) if isinstance(node.op, ast.Not) else node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        sides = [node.left, *node.comparators]
        pairs = list(map(_comparison, sides[:-1], node.ops, sides[1:]))
        return pairs[0] if len(pairs) == 1 else _call("_and", *pairs)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        return _call("_select", node.test, node.body, node.orelse)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "item" and not node.args:
            return _call("_number", node.func.value)
        return node


def _comparison(left: ast.expr, operator: ast.cmpop, right: ast.expr) -> ast.expr:
    if isinstance(operator, ast.Is | ast.IsNot) and isinstance(right, ast.Constant) and right.value is None:
        missing = _call("_missing", left)
        return missing if isinstance(operator, ast.Is) else _call("_not", missing)
    return ast.Compare(left, [operator], [right])


def _name(name: str) -> ast.expr:
    return ast.Name(name, ast.Load())


def _call(name: str, *arguments: ast.expr) -> ast.expr:
    return ast.Call(_name(name), list(arguments), [])


def _assign(target: ast.expr | str, value: ast.expr) -> ast.Assign:
    return ast.Assign([ast.Name(target, ast.Store()) if isinstance(target, str) else target], value)
