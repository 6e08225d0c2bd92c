"""From a prompt to a reply: what fits the context, the generation of tokens, one reply, a whole conversation.

Notebook 01 teaches `chat` and notebook 03 `session`. Read `generation` first: every reply comes from it.
"""
