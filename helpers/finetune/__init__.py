"""LoRA fine-tuning, taught by notebook 04: data -> rows of tokens -> adapter -> evaluation. Read `encoding` first.

samples, report = load_samples("data/lora/lu_zhishen.jsonl", card)
training, held_out = split_samples(samples)
model = add_lora(model)
finetune(model, encode_samples(tokenizer, training), encode_samples(tokenizer, held_out), "outputs/lora")
"""

# ruff: noqa: F401

from .arguments import LORA_DEFAULTS, REPLAY, default_learning_rate, default_settings, training_arguments
from .data import Sample, load_samples, read_card, replay_dialogues, split_samples
from .encoding import collate, describe_lengths, encode, encode_samples, pack, pad, share_prefix
from .evaluation import Comparison, Voice, base_ability, compare, perplexity, perplexity_before_and_after
from .lora import (
    LORA_TARGETS,
    add_lora,
    count_fused_lora_parameters,
    count_lora_parameters,
    lora_config,
    merge_adapter,
    remove_lora,
)
from .progress import plot_losses
from .report import DataReport
from .training import continue_lora, finetune
