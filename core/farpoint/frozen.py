"""A call that was recorded as a whole: where each object comes from, what it leaves behind, what it returns; and doing it again.

Each place of a recorded stream has a *source*: an argument, a pointer that the function found somewhere, an object that the call before
has left, or the call itself. What a call leaves behind, `param.grad` say, is the same Python object after the next one, and points at
what that one has made.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.utils import _pytree as pytree

from farpoint.errors import PlanError
from farpoint.pointer import PointerTensor
from farpoint.provenance import Place, spell
from farpoint.recording import Command, Registration, Run, Stream
from farpoint.references import Reference
from farpoint.route import SPENT, Route
from farpoint.submission import difference, send_plan

if TYPE_CHECKING:
    from farpoint.peer import Peer

_MADE, _ARGUMENT, _BEFORE, _FOUND, _PLAIN = "made", "argument", "before", "found", "plain"
Source = tuple[str, Any]
Places = dict[tuple["Peer", int], tuple[str, int]]


def sign(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[PointerTensor]] | None:
    """Return what a recording depends on of the arguments of a call, and the pointers among them; None if none fits another call.

    Args:
        args: Positional arguments.
        kwargs: The same by name.
    """
    leaves, structure = pytree.tree_flatten((args, kwargs))
    pointers = [leaf for leaf in leaves if type(leaf) is PointerTensor]
    key: list[Any] = [structure]
    seen: dict[int, int] = {}
    for leaf in leaves:
        if type(leaf) is PointerTensor:
            key += (leaf._route, leaf._spec, leaf.requires_grad, seen.setdefault(id(leaf._reference), len(seen)))
        elif leaf is None or type(leaf) in (bool, int, float, str):
            key += (type(leaf), leaf)
        else:
            return None
    return tuple(key), pointers


@attrs.frozen(eq=False)
class Part:
    """What one recorded call did on one worker.

    Attributes:
        peer: The worker.
        stream: What was issued, without ids.
        values: The numbers and small tensors in it.
        sources: Where the object in each place comes from.
        left: What is left behind: places, and the references there.
    """

    peer: Peer
    stream: Stream
    values: list[Any]
    sources: list[Source]
    left: dict[int, weakref.ref[Reference]]

    @property
    def commands(self) -> tuple[Command, ...]:
        """What was issued."""
        return tuple(self.stream.commands)


class Recording:
    """One call of a function, as it can be done again without the function.

    Args:
        run: The call, which was watched, and before its streams are sent.
        pointers: The pointers among its arguments.
        result: What it has returned.
        earlier: What the call before had left when this one began: `places`.

    Attributes:
        parts: What it did on each worker.
        stateless: Whether it leaves nothing behind.
    """

    def __init__(self, run: Run, pointers: list[PointerTensor], result: Any, earlier: Places) -> None:
        self.name = run.name
        leaves, self._structure = pytree.tree_flatten(result)
        given = {(p._reference.peer, p._reference.id): i for i, p in reversed(list(enumerate(pointers))) if p._reference is not None}
        returned = {id(leaf._reference) for leaf in leaves if type(leaf) is PointerTensor}
        self.parts: dict[str, Part] = {}
        self._routes: list[Route] = []
        for peer, stream in run.streams.items():
            sources: list[Source] = []
            left: dict[int, weakref.ref[Reference]] = {}
            for place, object_id in enumerate(stream.ids):
                name = (peer, object_id)
                if place in stream.results:
                    sources.append((_MADE, None))
                    weak = run.made.get(name)
                    alive = weak() if weak is not None else None
                    if weak is not None and alive is not None and id(alive) not in returned:
                        left[place] = weak
                elif name in given:
                    sources.append((_ARGUMENT, given[name]))
                elif name in earlier:
                    sources.append((_BEFORE, earlier[name]))
                else:
                    sources.append((_FOUND, run.used[name]))
            self.parts[peer.name] = Part(peer, stream, stream.values.copy(), sources, left)
        for pointer in run.used.values():
            if pointer._route is not SPENT and pointer._route not in self._routes:
                self._routes.append(pointer._route)
        indices = {id(pointer): i for i, pointer in enumerate(pointers)}
        written = {name: pointer for name, pointer in run.used.items() if pointer._version != run.versions[name]}
        self._written = [given.get(name, pointer) for name, pointer in written.items() if name not in earlier]
        self._returns: list[tuple[Any, ...]] = []
        for position, leaf in enumerate(leaves):
            if type(leaf) is not PointerTensor or leaf._reference is None:
                self._returns.append((_PLAIN, leaf))
            elif id(leaf) in indices:
                self._returns.append((_ARGUMENT, indices[id(leaf)]))
            else:
                part = self.parts.get(leaf._reference.peer.name)
                place = part.stream.places.get(leaf._reference.id, -1) if part is not None else -1
                if part is None or place not in part.stream.results:
                    self._returns.append((_FOUND, leaf))
                else:
                    self._returns.append((_MADE, part.peer.name, place, leaf._route, leaf._spec))
                    # As a replay returns it.
                    leaves[position] = PointerTensor.wrap(leaf._route, leaf._reference, leaf._spec)
        self._result = pytree.tree_unflatten(leaves, self._structure)

    @property
    def stateless(self) -> bool:
        return not any(part.left for part in self.parts.values())

    def take_result(self) -> Any:
        """Return what the call returned, as a replay does: pointers without a history. They are not kept."""
        result, self._result = self._result, None
        return result

    def settle(self) -> None:
        """Forget of what was left behind what is gone already."""
        for part in self.parts.values():
            for place in [place for place, reference in part.left.items() if reference() is None]:
                del part.left[place]

    def places(self) -> Places:
        """Return the worker and the place of each object that is left behind, by its id."""
        found: Places = {}
        for part in self.parts.values():
            for place, weak in part.left.items():
                reference = weak()
                if reference is not None:
                    found[part.peer, reference.id] = (part.peer.name, place)
        return found

    def unlike(self, other: Recording) -> tuple[str, str]:
        """Return in words what this call did differently from another one, and on which line; nothing if it did the same."""
        if self.parts.keys() != other.parts.keys():
            return f"it uses {', '.join(self.parts)} the one time and {', '.join(other.parts)} the other", ""
        for name, part in self.parts.items():
            before = other.parts[name]
            what, where = difference(before.stream, part.stream)
            if what:
                return what, where
            position = next((i for i, (a, b) in enumerate(zip(before.values, part.values, strict=True)) if not _same(a, b)), None)
            if position is not None:
                old, new = before.values[position], part.values[position]
                what = f"the number {old!r} the one time and {new!r} the other" if not isinstance(new, torch.Tensor) else "a small tensor"
                return what, spell(_line_of_value(part, position))
            for place, (old, new) in enumerate(zip(before.sources, part.sources, strict=True)):
                if not _same_source(old, new):
                    return "another tensor", spell(_line_of_place(part, place))
            if before.left.keys() != part.left.keys():
                place = min(before.left.keys() ^ part.left.keys())
                return "something that is kept after the one call and not after the other", spell(_line_of_place(part, place))
        if self._structure != other._structure or not all(map(_same_return, self._returns, other._returns)):
            return "it returns something else", ""
        return "", ""

    def ready(self) -> bool:
        """Return whether what it found, and what it left behind, is still there."""
        for part in self.parts.values():
            if part.peer.channel.lost is not None or any(reference() is None for reference in part.left.values()):
                return False
            found = [source for kind, source in part.sources if kind == _FOUND]
            if any(pointer._reference is None or pointer._route not in self._routes for pointer in found):
                return False
        return True

    def replay(self, pointers: list[PointerTensor], registrations: dict[str, tuple[Registration, bool]]) -> Any:
        """Do the same again.

        Args:
            pointers: The pointers among the arguments.
            registrations: The number of the plan on each worker, and whether it must be told of it.

        Returns:
            What the function would: with pointers of their own, which have no history.
        """
        for route in self._routes:
            route.order()
        made: dict[str, dict[int, int]] = {}
        ids = {name: self._fill(part, pointers, made.setdefault(name, {})) for name, part in self.parts.items()}
        kept = {(name, place) for kind, name, place, *_ in (r for r in self._returns if r[0] == _MADE)}
        for name, part in self.parts.items():
            given_up = [object_id for place, object_id in made[name].items() if place not in part.left and (name, place) not in kept]
            for place, weak in part.left.items():
                reference = weak()
                if reference is None:  # between `ready` and now, by another thread
                    given_up.append(made[name][place])
                else:
                    given_up.append(reference.id)
                    reference.id = made[name][place]
            number, fresh = registrations[name]
            send_plan(part.peer, number, part.stream, ids[name], part.values, given_up, fresh=fresh)
        for written in self._written:
            torch.autograd.graph.increment_version(pointers[written] if isinstance(written, int) else written)
        return pytree.tree_unflatten([self._return(leaf, pointers, made) for leaf in self._returns], self._structure)

    def _fill(self, part: Part, pointers: list[PointerTensor], made: dict[int, int]) -> list[int]:
        ids = []
        for place, (kind, source) in enumerate(part.sources):
            reference: Reference | None
            if kind == _MADE:
                made[place] = part.peer.references.new_id()
                ids.append(made[place])
                continue
            if kind == _ARGUMENT:
                reference = pointers[source]._reference
            elif kind == _BEFORE:
                reference = self.parts[source[0]].left[source[1]]()
            else:
                reference = source._reference
            if reference is None:
                raise PlanError(self.name, "needs an object that was given up meanwhile", spell(_line_of_place(part, place)), "repeat the call")
            ids.append(reference.id)
        return ids

    def _return(self, leaf: tuple[Any, ...], pointers: list[PointerTensor], made: dict[str, dict[int, int]]) -> Any:
        if leaf[0] == _ARGUMENT:
            return pointers[leaf[1]]
        if leaf[0] == _MADE:
            _, name, place, route, spec = leaf
            return PointerTensor.wrap(route, Reference(self.parts[name].peer, made[name][place]), spec)
        return leaf[1]


def _line_of_place(part: Part, place: int) -> Place:
    stream = part.stream
    return next(origin for command, origin in zip(stream.commands, stream.origins, strict=True) if place in command[1] or place in command[2])


def _line_of_value(part: Part, position: int) -> Place:
    for (_, operands, _), origin in zip(part.stream.commands, part.stream.origins, strict=True):
        position -= operands.count(-1)
        if position < 0:
            return origin
    raise IndexError(position)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        alike = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.dtype is other.dtype
        return alike and torch.equal(one, other)
    return type(one) is type(other) and repr(one) == repr(other)  # which tells -0.0 from 0.0, and NaN is NaN


def _same_source(one: Source, other: Source) -> bool:
    if one[0] != other[0]:
        return False
    if one[0] != _FOUND:
        return one[1] == other[1]  # type: ignore[no-any-return]  # of plain values
    # Pointers are not compared: that would be an operation on them.
    return one[1] is other[1] or (one[1]._reference is other[1]._reference is not None)


def _same_return(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    if one[0] != other[0]:
        return False
    if one[0] == _PLAIN:
        return one[1] is other[1] or _same(one[1], other[1])
    return one[1] is other[1] if one[0] == _FOUND else one[1:] == other[1:]
