"""Finding the mixture-of-experts blocks that a base model has of its own.

A block is found by its structure: a module holds several experts, as parameters stacked to three dimensions or as a
list of equal modules, and a part beside them has one row of weights for each of those experts, which is what a router
has (or is named one, since some have rows for "no expert" as well). What runs beside the experts in the same block
belongs to it: the shared expert with its gate, or a dense feed-forward block in parallel. Experts that are kept in
another way (in embeddings, as in Doge) are not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from moelora.inject.blocks import is_feed_forward, looks_like_feed_forward
from moelora.layers.modules import is_linear, unwrapped

# a stack of layers and a head with as many outputs as there are layers have the same sizes
_WORDS = re.compile(r"expert|moe|rout|gat(e|ing)", re.IGNORECASE)
_ROUTER = re.compile(r"rout|^gate ")


@dataclass(frozen=True)
class MoeBlock:
    """A mixture-of-experts block of the base model.

    Attributes:
        name: Name of the module that holds experts and router; it may be a whole decoder layer.
        experts: Name of the experts' module.
        parts: Names of all modules of the block that compute: experts, router, shared expert, ...
    """

    name: str
    experts: str
    parts: tuple[str, ...]


class _Tree:
    """A base model's modules with their children by name."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = {name: unwrapped(module) for name, module in modules.items()}
        self.children: dict[str, list[str]] = {name: [] for name in modules}
        for name in modules:
            if name:
                self.children[name.rpartition(".")[0]].append(name)

    def family(self, name: str) -> Iterator[str]:
        """A module and its children."""
        yield name
        yield from self.children[name]

    def words(self, name: str) -> str:
        """A module's name in its parent and its class."""
        return f"{name.rpartition('.')[-1]} {type(self.modules[name]).__name__}".lower()

    def has_linears(self, name: str) -> bool:
        """Whether there is a linear in a module, or it is one."""
        return is_linear(self.modules[name]) or any(map(self.has_linears, self.children[name]))


def find_moe_blocks(modules: Mapping[str, nn.Module]) -> list[MoeBlock]:
    """The blocks in the order of the model; of nested ones the innermost.

    Args:
        modules: The modules of the base model by name.
    """
    tree = _Tree(modules)
    found: dict[str, MoeBlock] = {}
    outer: set[str] = set()
    for name in sorted(modules, key=lambda name: name.count(".") if name else -1, reverse=True):
        if name in outer:
            continue
        block = _block_of(tree, name)
        if block is not None:
            found[name] = block
            while name:
                name = name.rpartition(".")[0]
                outer.add(name)
    return [found[name] for name in modules if name in found]


def _block_of(tree: _Tree, name: str) -> MoeBlock | None:
    for experts in (name, *tree.children[name]):
        counts = _stacked(tree.modules[experts])
        if experts != name:
            counts |= _listed(tree, experts) | _declared(tree, experts)
        if not counts:
            continue
        routers = [child for child in tree.children[name] if child != experts and _routes(tree, child, experts, counts)]
        words = [tree.words(part) for part in (experts, *routers)]
        own: list[str] = []
        if experts != name:  # of the experts themselves, a parameter with a row for each is their bias
            own = [key for key, tensor in tree.modules[name]._parameters.items() if _has_rows(tensor, counts)]
        if (routers or own) and any(map(_WORDS.search, (*words, *own))):
            parts = (name,) if experts == name else (experts, *routers, *_neighbours(tree, name, (experts, *routers)))
            return MoeBlock(name, experts, parts)
    return None


def _stacked(module: nn.Module) -> set[int]:
    """Numbers of experts that a module's own stacked parameters may hold."""
    if type(module).__module__.startswith("torch.nn."):  # convolutions
        return set()
    tensors = [tensor for tensor in module._parameters.values() if tensor is not None and tensor.ndim >= 3]
    return {len(tensor) for tensor in tensors if len(tensor) > 1}


def _listed(tree: _Tree, name: str) -> set[int]:
    children = [tree.modules[child] for child in tree.children[name]]
    equal = len({type(child) for child in children}) == 1
    holds = isinstance(tree.modules[name], (nn.ModuleList, nn.ModuleDict))
    return {len(children)} if holds and equal and len(children) > 1 and tree.has_linears(name) else set()


def _declared(tree: _Tree, name: str) -> set[int]:
    """Numbers of experts that a module named like experts, or its only part, says it has (`num_experts`, ...)."""
    if "expert" not in tree.words(name):
        return set()
    attributes = [pair for member in tree.family(name) for pair in vars(tree.modules[member]).items()]
    return {value for key, value in attributes if key.endswith("experts") and type(value) is int and value > 1}


def _routes(tree: _Tree, name: str, experts: str, counts: set[int]) -> bool:
    """Whether a module has a row of weights for each expert, or is named a router beside what is named experts."""
    if "expert" in tree.words(experts) and _ROUTER.search(tree.words(name)):
        return True
    tensors = (tensor for member in tree.family(name) for tensor in tree.modules[member]._parameters.values())
    return any(_has_rows(tensor, counts) for tensor in tensors)


def _has_rows(tensor: Tensor | None, counts: set[int]) -> bool:
    return tensor is not None and tensor.ndim == 2 and len(tensor) in counts


def _neighbours(tree: _Tree, name: str, members: tuple[str, ...]) -> list[str]:
    """What runs beside experts and router: all that has linears, or of a whole layer its feed-forward blocks only."""
    others = [child for child in tree.children[name] if child not in members and tree.has_linears(child)]
    dense = [child for child in others if looks_like_feed_forward(tree.modules[child])]
    if any(child not in dense and not is_linear(tree.modules[child]) for child in others):
        return dense
    parent = name.rpartition(".")[0]
    if not name or isinstance(tree.modules[parent], (nn.ModuleList, nn.Sequential)):
        return others
    siblings = [child for child in tree.children[parent] if child != name]
    return [*others, *(child for child in siblings if is_feed_forward(tree.modules[child]))]


def exclusion(blocks: Iterable[MoeBlock]) -> str:
    """A regex for `exclude_modules` that leaves out everything in these blocks."""
    blocks = list(blocks)
    if any("" in block.parts for block in blocks):  # the model is nothing but a block
        return ".*"
    families: dict[str, list[str]] = {}
    for part in (part for block in blocks for part in block.parts):
        pattern = re.sub(r"\b\d+\b", r"\\d+", re.escape(part))
        parent, dot, child = pattern.rpartition(r"\.")
        children = families.setdefault(parent + dot, [])
        if child not in children:
            children.append(child)
    patterns = [f"{parent}({'|'.join(children)})" for parent, children in families.items()]
    return (patterns[0] if len(patterns) == 1 else f"({'|'.join(patterns)})") + r"(\..*)?"
