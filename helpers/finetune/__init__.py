"""LoRA fine-tuning: data, training, evaluation.

samples, report = load_samples("data/lora/lu_zhishen.jsonl", card)
training, held_out = split_samples(samples)
model = add_lora(model)
finetune(model, encode_samples(tokenizer, training), encode_samples(tokenizer, held_out), "outputs/lora")
"""

from .data import DataReport, Sample, load_samples, read_card, replay_dialogues, split_samples
from .encoding import collate, describe_lengths, encode, encode_samples, pad, share_prefix
from .evaluation import Comparison, Voice, base_ability, compare, perplexity, perplexity_before_and_after
from .lora import (
    LORA_TARGETS,
    add_lora,
    count_fused_lora_parameters,
    count_lora_parameters,
    lora_config,
    merge_adapter,
    parameter_table,
)
from .progress import plot_losses
from .training import finetune, training_arguments

__all__ = [
    "LORA_TARGETS",
    "Comparison",
    "DataReport",
    "Sample",
    "Voice",
    "add_lora",
    "base_ability",
    "collate",
    "compare",
    "count_fused_lora_parameters",
    "count_lora_parameters",
    "describe_lengths",
    "encode",
    "encode_samples",
    "finetune",
    "load_samples",
    "lora_config",
    "pad",
    "merge_adapter",
    "parameter_table",
    "perplexity",
    "perplexity_before_and_after",
    "plot_losses",
    "read_card",
    "replay_dialogues",
    "share_prefix",
    "split_samples",
    "training_arguments",
]
