"""What the original modelling code computes, in its order and its memory layout, written out in plain PyTorch.

The baseline of benchmarks/speed.py: the original file no longer runs with today's transformers and is not part of this
project. Kept are the steps that cost time: one fused query_key_value product, activations of shape [tokens, batch, hidden],
the rotary table in the dtype of the weights with neighbouring numbers as pairs, keys and values copied to all query heads
in every step, a KV cache that `torch.cat` copies for every token, `scaled_dot_product_attention`, logits of the last token
only. The weights are those of a native model, so that both can be compared number by number.
"""

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu


class OriginalSteps:
    """Call with ids [1, tokens] and the cache of the tokens before: gives logits [vocabulary] and the new cache."""

    def __init__(self, model):
        """Take over the weights of a native model; only query, key and value are copied, into one."""
        self.config, self.weights = model.config, model.state_dict()
        for number in range(model.config.num_hidden_layers):
            for kind in ("weight", "bias"):
                names = [f"model.layers.{number}.self_attn.{part}_proj.{kind}" for part in "qkv"]
                self.weights[f"{number} qkv {kind}"] = torch.cat([self.weights.pop(name) for name in names])
        self.rotary = rotary_table(model.config, model.dtype)

    def __call__(self, ids: torch.Tensor, cache: list | None = None) -> tuple[torch.Tensor, list]:
        """One forward pass."""
        cache = cache or [None] * self.config.num_hidden_layers
        seen = 0 if cache[0] is None else cache[0][0].shape[0]
        rotary = self.rotary[seen : seen + ids.shape[1]]
        hidden = self.weights["model.embed_tokens.weight"][ids].transpose(0, 1).contiguous()
        grown = []
        for number, past in enumerate(cache):
            layer = f"model.layers.{number}"
            attended, kept = self.attend(number, self.norm(hidden, f"{layer}.input_layernorm"), rotary, past)
            hidden = hidden + linear(attended, self.weights[f"{layer}.self_attn.o_proj.weight"])
            gate, up = self.product(self.norm(hidden, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.gate_up_proj")
            hidden = hidden + linear(silu(gate) * up, self.weights[f"{layer}.mlp.down_proj.weight"])
            grown.append(kept)
        last = self.norm(hidden[-1:], "model.norm")
        return linear(last, self.weights["lm_head.weight"])[0, 0], grown

    def product(self, hidden: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Both halves of the first product of the MLP."""
        return linear(hidden, self.weights[f"{name}.weight"]).chunk(2, dim=-1)

    def norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        """RMSNorm; the mean in float32."""
        variance = hidden.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + self.config.rms_norm_eps)
        return (self.weights[f"{name}.weight"] * hidden).to(self.rotary.dtype)

    def attend(self, number: int, hidden: torch.Tensor, rotary: torch.Tensor, past) -> tuple[torch.Tensor, tuple]:
        """Attention of [tokens, 1, hidden] to itself and the past; also gives keys and values, grown."""
        heads, groups, size = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        mixed = linear(hidden, self.weights[f"{number} qkv weight"], self.weights[f"{number} qkv bias"])
        query, key, value = (
            part.view(*part.shape[:2], -1, size)
            for part in mixed.split([n * size for n in (heads, groups, groups)], -1)
        )
        query, key = rotate(query, rotary), rotate(key, rotary)
        if past is not None:
            key, value = (torch.cat(pair) for pair in zip(past, (key, value)))
        repeated = (
            part.unsqueeze(-2).expand(-1, -1, -1, heads // groups, -1).contiguous().view(*part.shape[:2], heads, size)
            for part in (key, value)
        )
        query, *others = (part.permute(1, 2, 0, 3) for part in (query, *repeated))
        context = scaled_dot_product_attention(query, *others, is_causal=past is None)
        return context.permute(2, 0, 1, 3).reshape(*hidden.shape[:2], heads * size), (key, value)


def rotary_table(config, dtype: torch.dtype) -> torch.Tensor:
    """Cosine and sine [positions, 1, 1, size / 4, 2] for half of each head."""
    turned = config.head_dim // 2
    frequencies = 10000.0 ** -(torch.arange(0, turned, 2) / turned)
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[:, None, None].to(dtype)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn the first half of every head of [tokens, 1, heads, size], neighbours as pairs."""
    turned, rest = x.chunk(2, dim=-1)
    pairs = turned.reshape(*turned.shape[:-1], -1, 2)
    first, second, cos, sin = pairs[..., 0], pairs[..., 1], table[..., 0], table[..., 1]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(3)
    return torch.cat([turned, rest], dim=-1)
