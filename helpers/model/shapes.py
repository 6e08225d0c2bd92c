"""How large the linear layers of a block are, and from that the size of a LoRA adapter: plain arithmetic, no torch."""

from collections.abc import Sequence

QKV = ("q_proj", "k_proj", "v_proj")


def linear_shapes(config) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers in one block, by the names transformers gives them."""
    heads, groups = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "q_proj": (config.hidden_size, heads),
        "k_proj": (config.hidden_size, groups),
        "v_proj": (config.hidden_size, groups),
        "o_proj": (heads, config.hidden_size),
        "gate_up_proj": (config.hidden_size, 2 * config.intermediate_size),
        "down_proj": (config.intermediate_size, config.hidden_size),
    }


def lora_count(config, rank: int, targets: Sequence[str] = QKV) -> int:
    """Parameters of a LoRA adapter: 3,784,704 for rank 8 on q, k and v of the 6B.

    A layer with `inputs` and `outputs` gets an A of (rank, inputs) and a B of (outputs, rank).
    """
    shapes = linear_shapes(config)
    return config.num_hidden_layers * sum(rank * sum(shapes[name]) for name in targets)
