"""Translate functions of `algorithms.theory` to JavaScript, so that the page computes with the formulas that Python has."""

import ast
from collections.abc import Sequence

CALLS = {
    "abs": "Math.abs",
    "len": "len",
    "sum": "sum",
    "math.cos": "Math.cos",
    "math.exp": "Math.exp",
    "math.fmod": "fmod",
    "math.log": "Math.log",
    "math.log1p": "Math.log1p",
    "math.sqrt": "Math.sqrt",
}
"""Python's function -> JavaScript's; `min` and `max`, which take a list or several numbers, are in the translation."""
NAMES = {"math.inf": "Infinity", "math.pi": "Math.PI"}
OPERATORS: dict[type, str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**", ast.And: "&&", ast.Or: "||", ast.USub: "-", ast.Not: "!",
    ast.Eq: "===", ast.NotEq: "!==", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
}  # fmt: skip
HELPERS = """const len = (values) => values.length;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const fmod = (a, b) => a % b;
const range = (from, to) => Array.from({ length: Math.max(0, to - from) }, (_, i) => from + i);
"""


def to_javascript(source: str, name: str) -> str:
    """The functions of a module as one JavaScript object.

    Args:
        source: Python of functions over numbers, strings, lists and dictionaries with constant keys, and of tables of functions.
        name: of the object; its members are called as the functions.

    Raises:
        ValueError: the source holds something that has no translation here; the message has its line.
    """
    module = ast.parse(source).body
    functions = [node for node in module if isinstance(node, ast.FunctionDef)]
    members = ", ".join(function.name for function in functions)
    tables = [_table(node) for node in module if isinstance(node, ast.Assign)]
    body = "\n".join([*(_function(function) for function in functions), *tables])
    return f"const {name} = (() => {{\n{HELPERS}{body}\nreturn {{ {members} }};\n}})();\n"


def _function(node: ast.FunctionDef) -> str:
    arguments = [argument.arg for argument in node.args.args]
    local = [name for name in dict.fromkeys(_assigned(node)) if name not in arguments]
    declared = f"let {', '.join(local)};\n" if local else ""
    return f"function {node.name}({', '.join(arguments)}) {{\n{declared}{_block(node.body)}\n}}"


def _table(node: ast.Assign) -> str:
    """A table of functions by name."""
    match node:
        case ast.Assign([ast.Name(name)], ast.Dict(keys, functions)) if all(isinstance(value, ast.Name) for value in functions):
            entries = [f"{_value(key)}: {_value(value)}" for key, value in zip(keys, functions, strict=True) if key is not None]
            return f"const {name} = {{ {', '.join(entries)} }};"
    raise _untranslatable(node)


def _assigned(node: ast.AST) -> list[str]:
    """Names that are assigned below a node; a comprehension's are its own."""
    if isinstance(node, ast.ListComp):
        return []
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    return [name for child in ast.iter_child_nodes(node) for name in _assigned(child)]


def _block(body: Sequence[ast.stmt]) -> str:
    return "\n".join(_statement(node) for node in body)


def _statement(node: ast.stmt) -> str:
    match node:
        case ast.Expr(ast.Constant(str())):
            return ""  # a docstring
        case ast.Expr(value):
            return f"{_value(value)};"
        case ast.Assign([ast.Name() | ast.Subscript() as target], value) | ast.AnnAssign(target, _, ast.expr() as value):
            return f"{_value(target)} = {_value(value)};"
        case ast.Return(ast.expr() as value):
            return f"return {_value(value)};"
        case ast.If(test, body, orelse):
            other = f" else {{\n{_block(orelse)}\n}}" if orelse else ""
            return f"if ({_value(test)}) {{\n{_block(body)}\n}}{other}"
        case ast.For(ast.Name(name), values, body, []):
            return f"for ({name} of {_value(values)}) {{\n{_block(body)}\n}}"
    raise _untranslatable(node)


def _value(node: ast.expr) -> str:
    match node:
        case ast.Constant(bool() as value):
            return "true" if value else "false"
        case ast.Constant(int() | float() as value):
            return repr(value)
        case ast.Constant(str() as value):
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case ast.Name(name):
            return name
        case ast.Attribute() if ast.unparse(node) in NAMES:
            return NAMES[ast.unparse(node)]
        case ast.UnaryOp(operator, value) if type(operator) in OPERATORS:
            return f"({OPERATORS[type(operator)]}{_value(value)})"
        case ast.BinOp(left, operator, right) if type(operator) in OPERATORS:
            return f"({_value(left)} {OPERATORS[type(operator)]} {_value(right)})"
        case ast.BoolOp(operator, values):
            return "(" + f" {OPERATORS[type(operator)]} ".join(map(_value, values)) + ")"
        case ast.Compare(left, operators, rights) if all(type(operator) in OPERATORS for operator in operators):
            sides = [_value(side) for side in (left, *rights)]
            pairs = [f"{a} {OPERATORS[type(o)]} {b}" for a, o, b in zip(sides, operators, sides[1:], strict=False)]
            return f"({' && '.join(pairs)})"
        case ast.IfExp(test, body, orelse):
            return f"({_value(test)} ? {_value(body)} : {_value(orelse)})"
        case ast.List(values):
            return f"[{', '.join(map(_value, values))}]"
        case ast.Starred(value):
            return f"...{_value(value)}"
        case ast.Subscript(values, ast.Slice(None, ast.expr() as end, None)):
            return f"{_value(values)}.slice(0, {_value(end)})"
        case ast.Subscript(values, index):
            return f"{_value(values)}[{_value(index)}]"
        case ast.ListComp(element, generators):
            return _comprehension(element, generators)
        case ast.Call(function, arguments, []):
            return _call(node, function, arguments)
    raise _untranslatable(node)


def _comprehension(element: ast.expr, generators: list[ast.comprehension]) -> str:
    (first, *rest) = generators
    if not isinstance(first.target, ast.Name):
        raise _untranslatable(element)
    name, values = first.target.id, _value(first.iter)
    for condition in first.ifs:
        values = f"{values}.filter(({name}) => {_value(condition)})"
    return (
        f"{values}.flatMap(({name}) => {_comprehension(element, rest)})"
        if rest
        else f"{values}.map(({name}) => {_value(element)})"
    )


def _call(node: ast.expr, function: ast.expr, arguments: list[ast.expr]) -> str:
    name, values = ast.unparse(function), [_value(argument) for argument in arguments]
    if name in ("min", "max"):
        return f"Math.{name}({'...' if len(values) == 1 else ''}{', '.join(values)})"
    if name == "range":
        return f"range({'0, ' if len(values) == 1 else ''}{', '.join(values)})"
    if isinstance(function, ast.Attribute) and function.attr == "append":
        return f"{_value(function.value)}.push({values[0]})"
    if isinstance(function, ast.Attribute) and name not in CALLS:
        raise _untranslatable(node)
    return f"{CALLS.get(name, name)}({', '.join(values)})"


def _untranslatable(node: ast.AST) -> ValueError:
    return ValueError(f"line {getattr(node, 'lineno', '?')}: no JavaScript for {ast.unparse(node)!r}")
