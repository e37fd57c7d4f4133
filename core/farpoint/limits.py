"""The limits that a party enforces on what it receives, all finite and all configurable."""

from __future__ import annotations

import attrs

MEBI = 1024 * 1024


@attrs.frozen(kw_only=True)
class Limits:
    """Bounds on incoming data, checked before anything is allocated.

    Attributes:
        header_bytes: Size of the control frame (everything of a message but its tensors), in bytes.
        depth: Nesting of lists and maps in a control frame.
        array_items: Items of one list in a control frame.
        map_items: Items of one map in a control frame.
        text_chars: Characters of one string in a control frame.
        message_bytes: Tensor bytes of one message.
        tensor_dims: Dimensions of one tensor.
        tensors: Tensors in one message.
        commands_in_flight: Commands that a session keeps unacknowledged.
        results: Results of one operation.
        tensor_list: Tensors in one list argument of an operation.
        templates: Command templates that a session may define.
        template_items: Arguments, and items of arguments, in all of them together.
        plans: Plans that a session may register.
        plan_commands: Commands of one plan.
        hops: Pointers that one chain may consist of.
        error_chars: Characters of an error text that travels.
        traceback_chars: Characters of a traceback that travels.
        failures: Errors that a client keeps until somebody looks at them.
        name_chars: Characters of a worker name, a tag or a word to search for.
        url_chars: Characters of a URL.
        description_chars: Characters of a description.
        capability_chars: Characters of a capability.
        tags: Tags of one object, words of one search.
        objects: Objects that a worker keeps for one session.
        bytes: Tensor bytes that a worker keeps for one session, and as many of answers that it has not acknowledged.
        operation_seconds: Time of one operation, on a worker that isolates its sessions.
        executor_bytes: Memory that the process of such a session may take, beside the objects.
        transfers: Moves that a session may have under way.
        links: Links of one worker to its clients, and as many to other workers.
        sessions_per_principal: Sessions of one principal: of one certificate, or of one token if there are several.
        bad_requests: Malformed messages on one link before it is closed.
        open_seconds: Time to open a link.
        ping_seconds: Silence after which a link is tested.
        pong_seconds: Time to answer such a test.
        close_seconds: Time to say goodbye.
        stall_seconds: Time that a write may make no progress.
        links_per_address: Links from one address.
        failed_logins: Wrong tokens from one address in a minute, before it has to wait for one.
        progress_seconds: Time that a call waits for a worker that gives no sign of life.
        lease_seconds: Time that a session outlives its link. After it, what only such sessions hold is in quarantine.
        kept_seconds: Time after which a session without a link is over, and what it held is freed; the lease is part of it.
        quarantine_bytes: Tensor bytes that may be in quarantine: beyond, sessions that have been away the longest are over.
        reconnect_seconds: Time that a client tries to come back while nobody listens where its worker was.
    """

    header_bytes: int = MEBI
    depth: int = 16
    array_items: int = 8_192
    map_items: int = 64
    text_chars: int = 65_536
    message_bytes: int = 4 * 1024 * MEBI
    tensor_dims: int = 32
    tensors: int = 4_096
    commands_in_flight: int = 4_096
    results: int = 1_024
    tensor_list: int = 1_024
    templates: int = 4_096
    template_items: int = 2**20
    plans: int = 256
    plan_commands: int = 8_192
    hops: int = 8
    error_chars: int = 500
    traceback_chars: int = 8_000
    failures: int = 4_096
    name_chars: int = 64
    url_chars: int = 1_024
    description_chars: int = 1_024
    capability_chars: int = 2_048
    tags: int = 16
    objects: int = 100_000
    bytes: int = 4 * 1024 * MEBI
    operation_seconds: float = 60.0
    executor_bytes: int = 4 * 1024 * MEBI
    transfers: int = 64
    links: int = 256
    sessions_per_principal: int = 16
    bad_requests: int = 10
    open_seconds: float = 5.0
    ping_seconds: float = 10.0
    pong_seconds: float = 10.0
    close_seconds: float = 2.0
    stall_seconds: float = 15.0
    links_per_address: int = 32
    failed_logins: int = 5
    progress_seconds: float = 30.0
    lease_seconds: float = 60.0
    kept_seconds: float = 600.0
    quarantine_bytes: int = 4 * 1024 * MEBI
    reconnect_seconds: float = 15.0

    def advertised(self) -> dict[str, float]:
        """Return the limits by name, as a welcome carries them."""
        return attrs.asdict(self)

    def answers(self) -> Limits:
        """Return the same for the answers to a session's commands: an answer is acknowledged later than its command."""
        return attrs.evolve(self, commands_in_flight=2 * self.commands_in_flight)


DEFAULT_LIMITS = Limits()
