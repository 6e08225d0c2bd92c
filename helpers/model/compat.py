"""What this folder uses of other libraries beyond their documented interface, read in transformers 5.23.0.

`tests/unit/test_compat.py` says which of these is gone after an update, and what breaks then.
"""

from transformers.conversion_mapping import (
    register_checkpoint_conversion_mapping as register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import Split as Split
from transformers.core_model_loading import WeightConverter as WeightConverter
from transformers.core_model_loading import WeightRenaming as WeightRenaming
from transformers.modeling_utils import load_state_dict as load_state_dict
from transformers.tokenization_utils_base import generate_merges as generate_merges

# "module:name", why it is used, and so what breaks without it.
NAMES = {
    "transformers.conversion_mapping:register_checkpoint_conversion_mapping": "original weight names are not understood",
    "transformers.core_model_loading:WeightRenaming": "the original weights cannot be renamed while they are read",
    "transformers.core_model_loading:WeightConverter": "query_key_value cannot become q, k and v while it is read",
    "transformers.core_model_loading:Split": "query_key_value cannot be split into q, k and v",
    "transformers.modeling_utils:load_state_dict": "names and shapes of a weight file cannot be read without its data",
    "transformers.tokenization_utils_base:generate_merges": "tokenizer.model cannot become a fast tokenizer",
    "transformers:TokenizersBackend.convert_to_native_format": "ChatGLMTokenizer overrides it to read tokenizer.model",
    "transformers:TokenizersBackend._decode": "ChatGLMTokenizer overrides it to decode half-written characters",
    "transformers:GlmForCausalLM._keys_to_ignore_on_load_unexpected": "the stored rotary table is reported as unknown",
    # bitsandbytes 0.50.2
    "bitsandbytes.nn:Linear4bit.support_avx512bf16_for_cpu": "nf4 models cannot be trained on CPUs with AVX512-BF16",
}
