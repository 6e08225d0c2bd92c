"""Three faces of one `ChatSession` (notebook widgets, web page, terminal), and two characters who talk to each other.

Notebook 03 teaches them. Read `conversations` first, then `notebook`; `web` and `terminal` do the same in other clothes.
"""
