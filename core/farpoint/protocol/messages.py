"""The table of message kinds. A message is a list whose first item is its kind.

Commands go from the client of a session to its worker, answers the other way. `farpoint.protocol.shapes` has the types of the
fields, `docs/protocol.md` describes them.
"""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """What a message asks or says."""

    DEFINE = 1
    """`slot, operation, args, kwargs`: keep a command template in a slot, in place of what was there."""
    RUN = 2
    """`slot, operands, scalars, results`: run a template; result ids are the client's choice, 0 discards."""
    ASK = 3
    """Like RUN, answered with the metadata of each result: for shapes that depend on data."""
    PUT = 4
    """`id, tensor, requires_grad, tags, description`: keep a tensor."""
    LINK = 5
    """`id, worker, url, target, spec, tags, description`: keep a pointer. Answered once its owner lists us as a holder."""
    CLAIM = 6
    """`id`: become a holder of an object. Answered."""
    RELEASE = 7
    """`ids`: give references up."""
    FETCH = 8
    """`id`: answered with the tensor, or with the pointer that is there."""
    MOVE = 9
    """`id, hops, destination, url, new id, holder, leave pointer`: move the data end. Answered when it is there."""
    SEARCH = 10
    """`words`: tags, and words of descriptions. Answered with ids."""
    TAG = 11
    """`id, tags, description`: write on an object; null leaves what is written."""
    CLEAR = 12
    """Drop every object of the worker. Answered."""
    SYNC = 13
    """`visited, further`: answered when everything before it has taken effect, here and where it was passed on to."""
    DESCRIBE = 14
    """`ids`: answered with the metadata of each data end."""
    TRANSFER = 15
    """`name, fields, payload`: a message of `farpoint.protocol.transfer`."""
    LIST = 16
    """`id`: answered with entries of the objects after that one: `farpoint.listing`."""
    LOCATE = 17
    """`id`: CLAIM, answered with the metadata of the data end, the workers on the way there, and what is written on the object."""

    READ = 18
    """`id, offset, length`: answered with bytes of a tensor, as they would travel."""
    SEED = 19
    """`seed`: begin the worker's random numbers anew."""
    PLAN = 20
    """`plan, commands`: keep a list of RUNs whose ids, numbers and tensors are left open; an empty list forgets it."""
    RUNPLAN = 21
    """`plan, ids, values, released`: carry the commands of a plan out, with these ids and values: `farpoint.macro`."""
    CHUNK = 32
    """`stream, about, offset, total, bytes`: a part of a tensor, in either direction: `farpoint.bulk`."""
    WHOLE = 33
    """`stream, dtype, shape, checksum, path, message`: the message that a tensor in chunks belongs to, and where."""

    ANSWER = 64
    """`seq, value`: the answer to a command."""
    FAILURE = 65
    """`seq, error`: a command failed."""
