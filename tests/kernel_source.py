"""Operations that are written out in a source, under whatever names: Gram matrices, spectra, iterations of products.

Names are followed to what they stand for: imports, other names of one tensor, its views and copies, several at once,
``out=`` and methods that work in place; and functions that multiply two arguments to where both are the same.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache, cached_property
from itertools import product

TRANSPOSES = ("mT", "mH", "T", "H", "t", "transpose", "swapaxes", "swapdims", "permute", "adjoint")
VIEWS = (
    "reshape", "view", "flatten", "unflatten", "contiguous", "clone", "detach", "conj", "to", "float", "double", "type",
    "unsqueeze", "squeeze", "expand", "expand_as", "movedim", "narrow", "resolve_conj", "requires_grad_",
)  # fmt: skip
# product -> how many factors it has besides what they are added to
PRODUCTS = {name: 0 for name in ("matmul", "mm", "bmm", "inner", "tensordot", "linear")} | {
    name: 1 for name in ("addmm", "baddbmm", "addbmm")
}
LIBRARY = {"eigh", "eigvalsh", "eig", "eigvals", "svd", "matrix_power", "matrix_exp"}
METHODS = {"svd", "matrix_power", "matrix_exp"}  # of tensors, too

Roots = set[tuple[str, bool]]


@cache
def nodes(tree: ast.AST) -> list[ast.AST]:
    """All nodes of a tree, which is asked for several times."""
    return list(ast.walk(tree))


def dotted(node: ast.expr) -> str:
    """The name of what is called, ``?`` for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def names(node: ast.AST) -> set[str]:
    """Names that are operands: those that are only asked for a dtype or device are not."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
        return names(node.func.value)
    found = {node.id} if isinstance(node, ast.Name) else set[str]()
    return found.union(*(names(child) for child in ast.iter_child_nodes(node)))


@cache
def imports(tree: ast.AST) -> dict[str, str]:
    """What a module calls something -> what it is: of imports, and of names for what can be called."""
    found: dict[str, str] = {}
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute | ast.Name):
            found |= {target.id: dotted(node.value) for target in node.targets if isinstance(target, ast.Name)}
    return found


def assignments(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Target and value of everything that is assigned, written into ``out=`` or changed in place."""
    for node in nodes(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield from paired(target, node.value)
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            yield node.target, node.value
        elif isinstance(node, ast.AugAssign):
            yield node.target, ast.BinOp(node.target, node.op, node.value)
        elif isinstance(node, ast.Call):
            yield from ((keyword.value, node) for keyword in node.keywords if keyword.arg == "out")
            if isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
                yield node.func.value, node.args[0] if node.func.attr == "copy_" and node.args else node


def paired(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """``a, b = x, y`` and ``a, b = (f(z) for z in (x, y))`` one by one."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.GeneratorExp | ast.ListComp):
        source = value.generators[0].iter
        if isinstance(source, ast.Tuple | ast.List) and len(source.elts) == len(target.elts):
            loop = dotted(value.generators[0].target)
            for one, x in zip(target.elts, source.elts):
                yield one, Replace(loop, x).visit(ast.parse(ast.unparse(value.elt), mode="eval")).body
            return
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        yield from zip(target.elts, value.elts)
    else:
        yield target, value


class Replace(ast.NodeTransformer):
    """Another expression in place of a name."""

    def __init__(self, name: str, value: ast.expr) -> None:
        self.name, self.value = name, value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.value if node.id == self.name else node


class Scope:
    """What the names of a function stand for."""

    def __init__(self, function: ast.AST, known: dict[str, str]) -> None:
        self.function, self.known = function, known | imports(function)

    @cached_property
    def values(self) -> dict[str, list[ast.expr]]:
        """What is assigned to every name."""
        found: dict[str, list[ast.expr]] = {}
        for target, value in assignments(self.function):
            if isinstance(target, ast.Name):
                found.setdefault(target.id, []).append(value)
        return found

    def called(self, node: ast.Call) -> str:
        """The name of what is called, as the library has it."""
        name, seen = dotted(node.func), set[str]()
        while (first := name.split(".")[0]) in self.known and first not in seen:
            seen.add(first)
            name = self.known[first] + name[len(first) :]
        return name

    def roots(self, node: ast.expr, turned: bool = False, seen: frozenset[str] = frozenset()) -> Roots:
        """The matrices of which an expression is a view or a copy, and whether it is their transpose."""
        if isinstance(node, ast.Name):
            found: Roots = {(ast.dump(node), turned)}
            if node.id not in seen:
                for value in self.values.get(node.id, []):
                    found |= self.roots(value, turned, seen | {node.id})
            return found
        if isinstance(node, ast.IfExp):
            return self.roots(node.body, turned, seen) | self.roots(node.orelse, turned, seen)
        if isinstance(node, ast.Attribute) and node.attr in TRANSPOSES:
            return self.roots(node.value, not turned, seen)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in VIEWS or node.func.attr in TRANSPOSES:
                inner = self.roots(node.func.value, turned != (node.func.attr in TRANSPOSES), seen)
                return inner | {(ast.dump(node), turned)}
        if isinstance(node, ast.Subscript) and all(map(keeps, parts(node.slice))):
            return self.roots(node.value, turned, seen)
        return {(ast.dump(node), turned)}

    def same(self, left: ast.expr, right: ast.expr, across: bool = True) -> bool:
        """Whether two expressions are of one matrix, one of them transposed if ``across``."""
        return bool(self.roots(left, across) & self.roots(right))

    def products(self, node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
        """Left and right of every matrix product."""
        for child in nodes(node):
            if isinstance(child, ast.BinOp) and isinstance(child.op, ast.MatMult):
                yield child.left, child.right
            elif isinstance(child, ast.Call):
                yield from self.factors(child)

    def factors(self, call: ast.Call) -> Iterator[tuple[ast.expr, ast.expr]]:
        *owner, name = self.called(call).split(".")
        arguments = [*call.args, *(word.value for word in call.keywords if word.arg not in ("out", "alpha", "beta"))]
        if owner[:1] != ["torch"] and isinstance(call.func, ast.Attribute):
            arguments = [call.func.value, *arguments]
        if name == "einsum" and len(arguments) == 3 and isinstance(arguments[0], ast.Constant):
            terms = str(arguments[0].value).replace(" ", "").replace("->", ",").split(",")
            if len(terms) == 3 and all(kept(*order, terms[2]) for order in (terms[:2], terms[1::-1])):
                yield arguments[1], ast.Attribute(arguments[2], "mT")
        elif name.removesuffix("_") in PRODUCTS and len(arguments) >= 2 + PRODUCTS[name.removesuffix("_")]:
            left, right = arguments[PRODUCTS[name.removesuffix("_")] :][:2]
            yield left, ast.Attribute(right, "mT") if name in ("linear", "inner", "tensordot") else right


def kept(term: str, other: str, result: str) -> bool:
    """Whether an operand of `einsum` has an axis of its own in the result, as a factor of a matrix product has."""
    return bool((set(term) - set(other)) & set(result) - {"."})


def parts(index: ast.expr) -> list[ast.expr]:
    return index.elts if isinstance(index, ast.Tuple) else [index]


def keeps(index: ast.expr) -> bool:
    """Whether an index leaves the matrices what they are: slices, all axes, new ones."""
    return isinstance(index, ast.Slice) or (isinstance(index, ast.Constant) and index.value in (None, ...))


def is_function(left: ast.expr, right: ast.expr, scope: Scope) -> bool:
    """``(v * f) @ v.mT``: a function of a symmetric matrix, from its eigenvectors; also ``v.mT @ (f * v)``."""
    def scaled(one: ast.expr, other: ast.expr) -> bool:
        values = [one, *(scope.values.get(one.id, []) if isinstance(one, ast.Name) else [])]
        return any(isinstance(x, ast.BinOp) and isinstance(x.op, ast.Mult)
                   and any(isinstance(side, ast.Name) and scope.same(side, other) for side in (x.left, x.right))
                   for x in values)  # fmt: skip

    return scaled(left, right) or scaled(right, left)


def iterates(loop: ast.For | ast.While, scope: Scope) -> bool:
    """Whether a loop multiplies what it computes by itself or by products with it: Newton-Schulz, squarings, roots."""
    assigned = [(names(target.value if isinstance(target, ast.Subscript) else target), value)
                for target, value in assignments(loop)]  # fmt: skip
    made: dict[str, set[str]] = {}  # of the products that a name is made of, or of what it is another name of
    for own, value in assigned:
        factors = [names(side) for pair in scope.products(value) for side in pair]
        if isinstance(value, ast.Name):
            factors.append({value.id})
        for name in own:
            made.setdefault(name, set()).update(*factors)

    def traced(side: ast.expr) -> set[str]:
        return names(side).union(*(made.get(name, set()) for name in names(side)))

    return any(traced(left) & traced(right) & own
               for own, value in assigned for left, right in scope.products(value))


def multiplies(tree: ast.AST, known: dict[str, str]) -> dict[str, set[tuple[int, int]]]:
    """Functions that multiply one argument by the transpose of another -> which ones."""
    found: dict[str, set[tuple[int, int]]] = {}
    for node in nodes(tree):
        if isinstance(node, ast.FunctionDef):
            scope = Scope(node, known)
            arguments = [ast.dump(ast.Name(x.arg, ast.Load())) for x in node.args.args if x.arg not in ("self", "cls")]
            for left, right in scope.products(node):
                one, other = scope.roots(left), scope.roots(right)
                if scope.same(left, right):
                    continue  # is found there
                for (i, p), (j, q) in product(enumerate(arguments), repeat=2):
                    if i != j and any((p, turned) in one and (q, not turned) in other for turned in (False, True)):
                        found.setdefault(node.name, set()).add((i, j))
    return found


def operations(
    function: ast.AST, known: dict[str, str], pairs: dict[str, set[tuple[int, int]]] | None = None
) -> set[str]:  # fmt: skip
    """The operations written out in a function; ``pairs``: what `multiplies` found."""
    found, scope = set(), Scope(function, known)
    for node in nodes(function):
        if isinstance(node, ast.Call):
            *owner, name = scope.called(node).split(".")
            if owner in (["torch"], ["torch", "linalg"]):
                found |= {name} & LIBRARY
            elif name in METHODS and not node.args and owner and owner[0] not in ("symgeo", "manifolds"):
                found.add(name)
            for i, j in (pairs or {}).get(name, ()):
                if max(i, j) < len(node.args) and scope.same(node.args[i], node.args[j], across=False):
                    found.add("gram")
        if isinstance(node, ast.For | ast.While) and iterates(node, scope):
            found.add("iteration")
    for left, right in scope.products(function):
        found |= {"gram"} if scope.same(left, right) else set()
        found |= {"function"} if is_function(left, right, scope) else set()
    return found


def written_out(
    tree: ast.Module, module: str, pairs: dict[str, set[tuple[int, int]]] | None = None
) -> dict[str, set[str]]:  # fmt: skip
    """The operations of every function and method of a module, and those outside of them."""
    found: dict[str, set[str]] = {}
    known = imports(ast.Module([x for x in tree.body if not isinstance(x, ast.FunctionDef | ast.ClassDef)], []))
    for node in tree.body:
        parts = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{module}.{node.name}" if isinstance(node, ast.ClassDef) else module
        for part in parts:
            name = f"{prefix}.{part.name}" if isinstance(part, ast.FunctionDef) else prefix
            if here := operations(part, known, pairs):
                found.setdefault(name, set()).update(here)
    return found
