"""How large is the 6B at 4 bits, and how much memory does llama.cpp take for it? Zeros in the 6B's shape answer that too.

python benchmarks/support/six_b_shape.py FOLDER        # 4.1 GB of disk; the 12.5 GB before it are a file full of holes
"""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.export.gguf import add_network, add_vocabulary, stored_bytes, stored_kind, weights
from helpers.model.loading import NANO_DIR
from helpers.model.modeling import CharacterGLMConfig

ALIGNMENT = 32  # of every tensor in a GGUF file


def write_zeros(file: Path, kind: str = "bf16") -> Path:
    """A GGUF of the 6B's shape. Its tokens are Nano's, the others have no name."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CharacterGLMConfig(), dtype=torch.bfloat16)
    writer = gguf.GGUFWriter(file, "chatglm")
    add_network(writer, model.config)
    add_vocabulary(writer, AutoTokenizer.from_pretrained(NANO_DIR), model.config.vocab_size)
    size = 0
    for name, tensor in weights(model).items():
        stored = stored_kind(tensor, kind)
        count = stored_bytes(tensor.shape, stored)
        writer.add_tensor_info(name, tensor.shape, np.dtype("float32"), count, raw_dtype=stored)
        size += -(-count // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(file, -(-file.stat().st_size // ALIGNMENT) * ALIGNMENT + size)
    return file


def resident_gb(file: Path, context: int) -> float:
    """Memory that a server on this file adds to this process after a reply, the mapped file counted."""
    from llama_server import LlamaServer

    before = psutil.Process().memory_info().rss
    server = LlamaServer(file, context)  # named: without a name it would be gone before the next line
    server.complete(list(range(100, 164)), 2)
    return (psutil.Process().memory_info().rss - before) / 1e9


def main() -> None:
    folder = Path(sys.argv[1])
    small = folder / "q4_k_m.gguf"
    if len(sys.argv) > 2:
        print(f"context {sys.argv[2]}: {resident_gb(small, int(sys.argv[2])):.2f} GB resident")
        return
    large = write_zeros(folder / "bf16.gguf")
    subprocess.run(["llama-quantize", large, small, "Q4_K_M"], check=True, capture_output=True)
    print(f"BF16 {large.stat().st_size / 1e9:.2f} GB, Q4_K_M {small.stat().st_size / 1e9:.2f} GB")
    for context in ("4096", "32768"):  # each in a process of its own
        subprocess.run([sys.executable, __file__, str(folder), context], check=True)


if __name__ == "__main__":
    main()
