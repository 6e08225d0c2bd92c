"""What `scripts/build_nano.py` is made of: the training conversations of CharacterGLM-Nano, its tokenizer, its training."""
