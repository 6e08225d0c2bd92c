"""From files to a model: the network, the tokenizer and the prompt, the download, loading, LoRA adapters, the KV cache.

Notebook 01 teaches it. Read `modeling` first (the network is transformers' own GLM), then `chat_template.jinja` (the prompt).
"""
