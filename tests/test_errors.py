"""The catalogue of errors: page and module agree, errors say what to do, and survive pickling, copying and the wire."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import farpoint
from farpoint import VirtualWorker, errors
from farpoint.errors import FarpointError, ProtocolError, RemoteExecutionError, UnseenErrorWarning
from farpoint.failures import describe_failure, read_failure, revive_failure
from farpoint.limits import DEFAULT_LIMITS
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind

farpoint.TorchHook(torch)
numbers = itertools.count()

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"
CLASSES: dict[str, type[FarpointError]] = {
    name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, FarpointError)
}
SAMPLES: list[FarpointError] = [
    FarpointError("torch.Tensor.send exists already"),
    errors.PointerError("it cannot be used"),
    errors.PointerSpentError("(Wrapper)>[PointerTensor | me:1 -> bob:2]", "get", "train.py:7"),
    errors.NotColocatedError("add", "at me -> bob", "at me -> alice", "move one of them with p.move(bob)"),
    errors.ValueNotHereError("p.item()", "bob"),
    errors.ResizedOutputError("aten::add.out", "[0]", "[2]"),
    errors.ForkedPointerError("a pointer to bob"),
    errors.PlanError("step", "reads a value", "train.py:7", "p.get() what it returns"),
    errors.ObjectNotFoundError(7, "bob", "it was freed"),
    errors.WorkerNotFoundError("bob", ["carol", "alice"]),
    errors.WorkerLostError("bob", "it was closed at train.py:7"),
    errors.CapabilityError("bob", "it has expired"),
    errors.WorkerRestartedError("bob", "it has another life"),
    errors.RemoteExecutionError("bob", "aten::inverse", "LinAlgError", "singular", "train.py:7", "Traceback ..."),
    errors.ExecutorCrashedError("bob", "aten::mm.default", "it was ended by SIGSEGV"),
    errors.OperationTimeoutError("bob", "aten::mm.default", 60.0),
    errors.PermissionDeniedError("bob", "clear", "no"),
    errors.OperationNotAllowedError("bob", "aten::from_file", "it is not in the table"),
    errors.GetNotPermittedError("bob", "get", "values stay"),
    errors.InvalidNameError("tag", "x", "a # and then 1 to 63 characters"),
    errors.InsecureListenerError("ws://0.0.0.0:8765", "others can listen in", "give --tls-cert"),
    errors.EncodeError("a sparse tensor cannot travel"),
    errors.DecodeError("a header ends in the middle"),
    errors.LimitError("tags", 16, 17),
    errors.LimitError("depth", 16, "a message of 17 levels"),
    errors.QuotaError("bob", "objects", 100_000, "object 100001"),
    errors.ProtocolError("a packet must be a list"),
    errors.MalformedMessageError("PUT", "id", "an id", "'x'"),
    errors.RefusedError("bob", "this session is in use"),
    errors.StaleIncarnationError("an earlier life was meant"),
    errors.TransportError("virtual://bob", "the token is not accepted there"),
    errors.UnreachableError("tcp://alice:1", "connection refused", "move with relay=True", "bob", "alice"),
    errors.NotAdmittedError("virtual://bob", "the token is not accepted there", "farpoint.connect(url, token=...)"),
    errors.NobodyListensError("virtual://bob", "nobody listens there"),
    errors.SynchronizationTimeoutError("bob", 2.5, "the link is gone"),
    errors.PluginError("serializer", "cbor", "no plugin provides it", ("msgpack", "torch"), "pip install farpoint-cbor"),
]
BASES = {"FarpointError", "PointerError"}

each = pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)


def evidence(error: FarpointError) -> dict[str, Any]:
    """Return the attributes that the message of an error is built from."""
    if type(error).__name__ in BASES:
        return {}
    names = list(inspect.signature(type(error)).parameters)
    return {name: getattr(error, name) for name in names}


def same(one: FarpointError, other: BaseException) -> bool:
    return type(one) is type(other) and isinstance(other, FarpointError) and vars(one) == vars(other) and str(one) == str(other)


class TestCatalogue:
    def test_there_is_a_sample_of_each(self) -> None:
        assert {type(error).__name__ for error in SAMPLES} == set(CLASSES)

    def test_the_page_lists_each_with_its_base_and_attributes(self) -> None:
        sections = dict(re.findall(r"^### `(\w+)`(?: \((?:\w+)\))?\n\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
        assert set(sections) == {*CLASSES, "UnseenErrorWarning"}
        bases = dict(re.findall(r"^### `(\w+)` \((\w+)\)$", PAGE.read_text(), re.MULTILINE))
        for error in SAMPLES:
            name = type(error).__name__
            text = sections[name]
            built_in = [base.__name__ for base in type(error).__bases__ if base.__module__ == "builtins"]
            assert [bases[name]] == built_in if name in bases else not built_in, name
            for attribute in evidence(error):
                assert f"`{attribute}`" in text, (name, attribute)
            if name not in BASES:
                assert "What to do: " in text, name

    def test_the_tree_in_the_module_lists_each_below_its_base(self) -> None:
        tree = re.findall(r"^([ │├└─]*)(\w+)(?: .*)?$", errors.__doc__ or "", re.MULTILINE)
        path: list[str] = []
        parents = {}
        for indent, name in tree:
            if name in CLASSES:
                depth = len(indent) // 4
                path = [*path[: depth - 1], name] if depth > 1 else [name]
                parents[name] = path[-2] if len(path) > 1 else None
        for name, kind in CLASSES.items():
            ours = [base.__name__ for base in kind.__bases__ if base.__module__ == "farpoint.errors"]
            assert name in parents, name
            assert parents[name] == (ours[0] if ours else None), name

    def test_each_is_exported(self) -> None:
        for name in [*CLASSES, "UnseenErrorWarning"]:
            assert name in farpoint.__all__ and getattr(farpoint, name) is getattr(errors, name)
        assert sorted(set(farpoint.__all__)) == sorted(farpoint.__all__)
        assert all(hasattr(farpoint, name) for name in farpoint.__all__)

    def test_none_is_a_type_error(self) -> None:
        every = [*CLASSES.values(), UnseenErrorWarning]
        assert not [kind for kind in every if issubclass(kind, TypeError)]

    @each
    def test_the_arguments_are_the_attributes_and_make_the_message(self, error: FarpointError) -> None:
        found = evidence(error)
        again = type(error)(**found) if found else type(error)(str(error))
        assert same(error, again)
        for name, value in found.items():
            shown = [str(item) for item in value] if isinstance(value, tuple) else [f"{value:g}" if isinstance(value, float) else str(value)]
            assert all(text in str(error) for text in shown), (name, value)

    @each
    def test_it_says_what_to_type_next(self, error: FarpointError) -> None:
        if type(error).__name__ in BASES:
            return  # they have no words of their own
        next_step = (
            r"p\.get\(|get\(keep=True\)|p\.move\(|\.search\(|VirtualWorker\(|relay=True|connect\(url|connect again|correct that call|Ask whoever|"
            r"get\(\) the operands|use a #|Convert it first|farpoint --version|Limits\(|Connect again|repeat the call|"
            r"same call may be repeated|pip install|num_workers=0|leave out= away|give --tls-cert"
        )
        assert re.search(next_step, str(error)), str(error)

    def test_no_message_names_what_does_not_exist(self) -> None:
        for error in SAMPLES:
            for name in re.findall(r"\bfarpoint\.(\w+)", str(error)):
                assert hasattr(farpoint, name), (type(error).__name__, name)


class TestCopies:
    @each
    def test_pickling_and_copying(self, error: FarpointError) -> None:
        error.origin, error.line = "bob", "train.py:7"
        error.add_note("a note")
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert same(error, pickle.loads(pickle.dumps(error, protocol)))
        for other in (copy.copy(error), copy.deepcopy(error)):
            assert same(error, other) and other is not error
            assert other.__traceback__ is None and other.__notes__ == ["a note"]
        del error.__notes__
        error.origin = error.line = ""

    def test_a_copy_has_attributes_of_its_own(self) -> None:
        one = errors.WorkerLostError("bob", "x")
        other = copy.copy(one)
        other.worker = "alice"
        assert one.worker == "bob"


class TestWire:
    @pytest.mark.parametrize("serializer", ["msgpack", "torch"])
    @each
    def test_an_error_arrives_as_it_was(self, error: FarpointError, serializer: str) -> None:
        codec = plugins.serializer(serializer, DEFAULT_LIMITS)
        sent = describe_failure(error, "bob", "aten::add.Tensor", expose=False)
        failure = read_failure(codec.decode(codec.encode(sent)), "bob")
        revived = revive_failure(failure, "")
        if isinstance(error, RemoteExecutionError):
            error = RemoteExecutionError(**{**evidence(error), "line": ""})
        assert type(revived) is type(error) and evidence(revived) == evidence(error) and str(revived) == str(error)
        assert (revived.origin, revived.line) == ("bob", "")

    @each
    def test_the_line_that_issued_it_comes_first(self, error: FarpointError) -> None:
        revived = revive_failure(read_failure(describe_failure(error, "bob", "", expose=False), "bob"), "train.py:9")
        assert str(revived).startswith("train.py:9: ") and revived.line == "train.py:9"

    def test_errors_of_others_become_one_of_ours(self) -> None:
        try:
            raise KeyError("x" * 1000)
        except KeyError as error:
            shown = describe_failure(error, "bob", "aten::add.Tensor", expose=True)
            hidden = describe_failure(error, "bob", "aten::add.Tensor", expose=False)
        revived = revive_failure(read_failure(shown, "bob"), "train.py:9")
        assert isinstance(revived, RemoteExecutionError)
        assert (revived.worker, revived.operation, revived.error) == ("bob", "aten::add.Tensor", "KeyError")
        assert len(revived.text) == DEFAULT_LIMITS.error_chars and "raise KeyError" in revived.remote_traceback
        assert "Traceback" not in str(hidden) and "test_errors" not in str(hidden)

    def test_an_error_that_cannot_say_itself_is_told_all_the_same(self) -> None:
        class MuteError(Exception):
            def __str__(self) -> str:
                raise ValueError("no text")

        revived = revive_failure(read_failure(describe_failure(MuteError(), "bob", "", expose=True), "bob"), "")
        assert isinstance(revived, RemoteExecutionError) and revived.error == "MuteError" and "cannot be had" in revived.text

    def test_only_our_own_classes_are_named(self) -> None:
        class LimitError(Exception):
            """Somebody else's."""

        assert describe_failure(LimitError("x"), "bob", "", expose=False)["kind"] == "RemoteExecutionError"

    def test_an_error_that_is_passed_on_keeps_its_evidence_and_its_origin(self) -> None:
        first = revive_failure(read_failure(describe_failure(ValueError("x"), "bob", "aten::add.Tensor", expose=False), "bob"), "")
        second = revive_failure(read_failure(describe_failure(first, "alice", "MOVE", expose=False), "alice"), "")
        assert isinstance(second, RemoteExecutionError) and evidence(second) == evidence(first) and second.origin == "bob"

    @pytest.mark.parametrize(
        "broken",
        [
            {"evidence": None},
            {"evidence": []},
            {"evidence": {}},
            {"evidence": {"object_id": "7", "worker": "bob", "reason": ""}},
            {"evidence": {"object_id": True, "worker": "bob", "reason": ""}},
            {"evidence": {"object_id": 7, "worker": None, "reason": ""}},
            {"evidence": {"object_id": 7, "worker": "bob", "reason": ["x"]}},
        ],
    )
    def test_malformed_evidence_leaves_the_class_and_the_text(self, broken: dict[str, Any]) -> None:
        good = describe_failure(errors.ObjectNotFoundError(7, "bob"), "bob", "", expose=False)
        revived: Any = revive_failure(read_failure({**good, **broken}, "bob"), "")
        assert type(revived) is errors.ObjectNotFoundError and str(revived) == good["text"]
        assert (revived.object_id, revived.worker, revived.reason) == (0, "", "")

    def test_evidence_that_nobody_asked_for_is_not_set(self) -> None:
        good = describe_failure(errors.EncodeError("x"), "bob", "", expose=False)
        extra = {"args": ["y"], "__class__": "z", "with_traceback": "w"}
        revived = revive_failure(read_failure({**good, "evidence": {**good["evidence"], **extra}, "args": 7}, "bob"), "")
        assert same(revived, _with_origin(errors.EncodeError("x"), "bob"))

    def test_what_is_too_long_is_cut(self) -> None:
        long = errors.PluginError("store", "x" * 9999, "y", ["z" * 9999] * 9999)
        failure = describe_failure(long, "bob", "", expose=False)
        for source in (failure, {**failure, "evidence": {**evidence(long), "available": list(long.available)}}):
            revived: Any = revive_failure(read_failure(source, "bob"), "")
            assert len(revived.name) == len(revived.available[0]) == DEFAULT_LIMITS.error_chars and len(revived.available) == 64

    @pytest.mark.parametrize("kind", ["NewerError", "Exception", "SystemExit", "", "__class__", "Any"])
    def test_a_class_that_is_not_known_here(self, kind: str) -> None:
        failure = describe_failure(errors.EncodeError("some reason"), "bob", "PUT", expose=False)
        revived = revive_failure(read_failure({**failure, "kind": kind}, "bob"), "train.py:9")
        assert isinstance(revived, RemoteExecutionError) and (revived.error, revived.worker) == (kind, "bob")
        assert "some reason" in revived.text

    @pytest.mark.parametrize("content", [None, 7, "x", [], {}, {"uid": "x"}, {"uid": True}, {"uid": 1.5}, {"text": "x"}])
    def test_what_is_no_failure_is_reported_as_that(self, content: Any) -> None:
        revived = revive_failure(read_failure(content, "bob"), "")
        assert isinstance(revived, ProtocolError) and "bob reported a failure in a form that is none" in str(revived)
        assert revived.origin == "bob"

    @pytest.mark.parametrize("field", ["kind", "worker", "operation", "text", "evidence", "orphan"])
    @pytest.mark.parametrize("value", [None, 7, 1e300, b"x", [[]], {"a": {}}, torch.ones(2)], ids=lambda value: type(value).__name__)
    def test_any_field_may_hold_anything(self, field: str, value: Any) -> None:
        for error in (errors.LimitError("tags", 16, 17), ValueError("x"), FarpointError("x")):
            failure = describe_failure(error, "bob", "", expose=False)
            failure[field] = value
            revived = revive_failure(read_failure(failure, "bob"), "train.py:9")
            assert isinstance(revived, FarpointError) and isinstance(revived.origin, str)
            pickle.dumps(revived)


def _with_origin(error: FarpointError, origin: str) -> FarpointError:
    error.origin = origin
    error.line = ""
    return error


class TestSessions:
    @pytest.fixture
    def bob(self) -> Iterator[VirtualWorker]:
        bob = VirtualWorker(id=f"bob-{next(numbers)}")
        yield bob
        bob.close()

    def test_an_error_has_here_what_it_had_there(self, bob: VirtualWorker) -> None:
        x: Any = torch.ones(2)
        p = x.send(bob)
        bob.clear_objects()
        with pytest.raises(errors.ObjectNotFoundError) as caught:
            p.get()
        assert (caught.value.object_id, caught.value.worker, caught.value.origin) == (p.id_at_location, bob.id, bob.id)
        with pytest.raises(errors.ProtocolError) as there:
            bob.peer.request([int(Kind.LIST), "x"])
        assert there.value.reason == "LIST: after must be an id, or 0, and 'x' was sent" and there.value.origin == bob.id

    @pytest.mark.parametrize("failure", [None, [], {"uid": 1, "kind": "LimitError", "evidence": {"limit": []}}, {"lost": True}])
    def test_a_hostile_worker_costs_the_client_an_error_of_ours(self, bob: VirtualWorker, failure: Any) -> None:
        bob._worker._commands[int(Kind.SEARCH)] = lambda guest, number, _: guest._say([int(Kind.FAILURE), number, failure])
        with pytest.raises((errors.ProtocolError, errors.LimitError)):
            bob.search("#x")
