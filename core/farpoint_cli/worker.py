"""`farpoint worker`: a worker as a process of its own."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farpoint_cli.complaint import complain

if TYPE_CHECKING:
    from farpoint.host import Hosting
    from farpoint.limits import Limits
    from farpoint.worker import Worker


class LogFormat(StrEnum):
    """How the log is written."""

    text = "text"
    json = "json"


def worker(
    name: Annotated[str, typer.Argument(help="What others call it: letters, digits and _.:#-")],
    listen: Annotated[str, typer.Option(help="Where it listens: ws, wss, tcp, tls or unix.")] = "ws://127.0.0.1:8765",
    advertise: Annotated[str, typer.Option(metavar="URL", help="Where others dial, if that is another URL.")] = "",
    store: Annotated[str | None, typer.Option(help="Kind of its object store. By default FARPOINT_STORE, else memory.")] = None,
    serializer: Annotated[
        str, typer.Option(help="How it writes tensors to workers that it dials. By default FARPOINT_SERIALIZER, else msgpack.")
    ] = "",
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Tokens, one on each line: who shows one may come in. Made, with one token, if it is not there. "
            "Without this option a token is made up and printed.",
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Its certificate with the chain, PEM: for wss and tls.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="The key of that certificate.")] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Mutual TLS: nobody may come in without a certificate signed by one of these authorities."),
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Authorities it trusts where it dials other workers. By default those of --tls-ca.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Do without a token, and without TLS where others can listen in, also to dial them.")
    ] = False,
    origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="A web page that may open a link, like https://example.org. Repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where operations run: cpu; workers do not support others yet.")] = "cpu",
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="What it puts up with, like bytes=1000000. Repeatable.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Dial only workers here, like tls://*.example.org:9000. Repeatable. By default any that a client names."),
    ] = None,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Run the operations of each session in a process of its own, with a memory limit and a deadline.")
    ] = False,
    log_format: Annotated[LogFormat, typer.Option(help="How the log on standard error is written.")] = LogFormat.text,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log only what goes wrong.")] = False,
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
    announce_json: Annotated[bool, typer.Option("--announce-json", hidden=True)] = False,
) -> None:
    """Run a worker until Ctrl-C or SIGTERM. It prints what to type to use it."""
    if (tls_cert is None) != (tls_key is None):
        complain("worker", "--tls-cert and --tls-key belong together: give both", 2)
    from farpoint.errors import FarpointError, InsecureListenerError, PluginError
    from farpoint.host import Hosting, host
    from farpoint.tokens import new_token, read_tokens

    _log(log_format, quiet=quiet)
    try:
        limits = read_limits(limit or [])
        tokens: tuple[str, ...] = ()
        if token_file is not None:
            tokens = read_tokens(token_file)
        elif tls_ca is None and not insecure:
            tokens = (new_token(),)
        hosting = Hosting(
            name=name,
            listen=listen,
            advertise=advertise,
            store=store or os.environ.get("FARPOINT_STORE") or "memory",
            serializer=serializer,
            tokens=tokens,
            insecure=insecure,
            certificate=(tls_cert, tls_key) if tls_cert is not None and tls_key is not None else None,
            clients=tls_ca,
            trusted=ca,
            origins=tuple(origin or ()),
            device=device,
            limits=limits,
            reachable=tuple(peer or ()),
            isolate=isolate,
        )

        def announce(made: Worker) -> None:
            if announce_json:
                text = json.dumps({"event": "listening", "worker": made.id, "url": made.url})
            else:
                text = _invitation(hosting, made.url, token_file)
            typer.echo(text)
            sys.stdout.flush()

        host(hosting, announce, until_eof=until_eof)
    except (PluginError, InsecureListenerError, ValueError) as error:
        complain("worker", error, 2)  # a mistake in what was typed
    except (FarpointError, OSError) as error:
        complain("worker", error, 1)
    _end()


def _end() -> None:
    """End this process, in good order as far as it matters: the worker is closed.

    Threads of its links may still be within torch. An interpreter that is taken down under them may abort the process.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def read_limits(texts: list[str]) -> Limits:
    """Return the default limits with some of them changed.

    Args:
        texts: Like `bytes=1000000`.

    Raises:
        ValueError: There is no such limit, or its value is none.
    """
    import attrs

    from farpoint.limits import DEFAULT_LIMITS

    known = attrs.asdict(DEFAULT_LIMITS)
    changed: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            raise ValueError(f"--limit {text}: there is no limit {name!r}; the names are {', '.join(known)}")
        kind = type(known[name])
        try:
            changed[name] = kind(value)
        except ValueError:
            changed[name] = 0
        if not 0 < changed[name] < float("inf"):
            number = "a whole number" if kind is int else "a number of seconds"
            raise ValueError(f"--limit {text}: write {name}=VALUE with {number} above 0; the default is {known[name]}")
    return attrs.evolve(DEFAULT_LIMITS, **changed)


def _invitation(hosting: Hosting, url: str, token_file: Path | None) -> str:
    """Return what to type to use the worker. A token from a file is not shown: whoever keeps the output need not keep it secret."""
    lines = [f"{hosting.name} listens. To use it:", ""]
    arguments = [f'"{url}"']
    if token_file is not None:
        lines.append("    import pathlib")
        arguments.append(f'token=pathlib.Path("{token_file.absolute()}").read_text().split()[0]')
    elif hosting.tokens:
        arguments.append(f'token="{hosting.tokens[0]}"')
    elif hosting.clients is None:
        lines[1:] = ["Everybody who can reach it may come in, and do whatever it permits.", ""]
    if hosting.clients is not None:
        lines.append("    # context: an ssl.SSLContext with a certificate that it accepts, see docs/workers.md")
        arguments.append("tls=context")
    elif hosting.certificate is not None:
        lines.append('    # with ca="FILE" as well, unless your system trusts who has signed its certificate')
    lines.append(f"    farpoint.connect({', '.join(arguments)})")
    return "\n".join([*lines, ""])


class JsonFormatter(logging.Formatter):
    """One object on each line."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


def _log(form: LogFormat, *, quiet: bool) -> None:
    """Write what farpoint logs to standard error."""
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form is LogFormat.json else text)
    logger = logging.getLogger("farpoint")
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
