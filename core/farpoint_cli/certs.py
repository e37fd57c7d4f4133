"""`farpoint certs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farpoint_cli.complaint import complain


def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")],
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Host name or address that workers are dialled by. Repeatable. By default this machine."),
    ] = None,
    client: Annotated[str, typer.Option(metavar="NAME", help="What the client is called; policies see it.")] = "client",
) -> None:
    """Make an authority of your own and certificates for workers and clients, for development. They are valid for 90 days."""
    from farpoint.certificates import DAYS, LOCAL, make_certificates
    from farpoint.errors import PluginError

    names = name or list(LOCAL)
    try:
        made = make_certificates(folder, names, client)
    except (PluginError, OSError) as error:
        complain("certs", error, 1)
    except ValueError as error:
        complain("certs", error, 2)
    host = f"[{names[0]}]" if ":" in names[0] else names[0]
    typer.echo(f"""\
An authority, and certificates for {', '.join(names)} and for the client {client}, valid for {DAYS} days, are in {folder}.
Keep the keys secret. A worker, here with other workers that it may dial:

    farpoint worker bob --listen wss://{host}:8765 --token-file tokens \\
        --tls-cert {made.server} --tls-key {made.server_key} --ca {made.authority}

Who shows the token may come in:

    farpoint.connect("wss://{host}:8765", token="...", ca="{made.authority}")

For mutual TLS give the worker --tls-ca {made.authority} in place of --ca, and without --token-file no token is needed:

    context = ssl.create_default_context(cafile="{made.authority}")
    context.load_cert_chain("{made.client}", "{made.client_key}")
    farpoint.connect("wss://{host}:8765", tls=context)

Is it there?

    farpoint ping wss://{host}:8765 --ca {made.authority} --tls-cert {made.client} --tls-key {made.client_key}
""")
