"""The next CharacterGLM-Nano: its training conversations, tokenizer, training, and what it is measured by. Read `compose` first."""
