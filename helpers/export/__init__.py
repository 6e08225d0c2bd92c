"""Copies of a model for other programs: a plain GLM folder for vLLM and others, and safetensors files.

Notebook 02 exports at its end. Read `plain` first.
"""
