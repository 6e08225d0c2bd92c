"""Attention for a batch of requests that stand one after another in a row.

transformers' `sdpa` lets every token of a batch look at the keys of all requests and masks those of the others: with 16
users nearly all of that work is thrown away. Here each request attends to its own keys only, as flash attention does
where it is installed.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "request_by_request"


def request_by_request(module, query, key, value, attention_mask, scaling, cache=None, **kwargs):
    """Attention output [1, tokens, heads, head_dim] for the packed batches of continuous batching.

    Args:
        query: [1, heads, tokens, head_dim]; key, value: [1, key heads, keys, head_dim].
        kwargs: `cu_seq_lens_q` and `cu_seq_lens_k`, where each request begins and ends among tokens and keys. Three new
            tokens of one request and one of another that has 9 already: [0, 3, 4] and [0, 3, 13].
    """
    if cache is not None:  # up to transformers 5.23; from 5.24 on the model itself asks the cache for all the keys
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    token_ends, key_ends = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    outputs = []
    for i in range(len(token_ends) - 1):
        tokens, keys = slice(*token_ends[i : i + 2]), slice(*key_ends[i : i + 2])
        outputs.append(attend(query[:, :, tokens], key[:, :, keys], value[:, :, keys], scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention of one request, whose tokens are the last ones among its keys; [1, heads, tokens, head_dim]."""
    tokens, keys = query.shape[2], key.shape[2]
    if tokens == 1:
        # The heads that share a key become the rows of one small matrix: no key is copied.
        grouped = query.reshape(1, key.shape[1], -1, query.shape[3])
        return scaled_dot_product_attention(grouped, key, value, scale=scaling).reshape(query.shape)
    mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)


AttentionInterface.register(NAME, request_by_request)
