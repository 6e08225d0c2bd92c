"""Who speaks: personas, character cards and written dialogues.

Every notebook takes its characters from here; notebook 03 makes one of your own. Read `personas` first.
"""
