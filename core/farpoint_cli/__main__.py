"""`python -m farpoint_cli` is the command `farpoint`."""

from farpoint_cli.app import main

main()
