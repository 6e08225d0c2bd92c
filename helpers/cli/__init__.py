"""The command line `python -m helpers`: thin Typer commands, one file a group.

No notebook teaches it; each names the command that does the same. Read `app` first: it collects the groups.
"""
