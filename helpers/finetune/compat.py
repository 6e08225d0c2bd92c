"""The private names of transformers that this folder leans on, as read in 5.23.0; a test says when one is gone."""

from transformers import Trainer

NAMES = {
    "transformers:Trainer._get_train_sampler": "rows would come in another order in every process",
    "transformers:TrainingArguments._n_gpu": "one process would split a packed row over all GPUs of the machine",
    "transformers:PreTrainedConfig._attn_implementation": "nobody knows whether packed rows may be used",
}


class OrderedTrainer(Trainer):
    """A Trainer that takes the training rows in the order of `train_sampler`; None leaves the order to transformers.

    The public way, `get_train_dataloader`, would have to do again what accelerate needs for several processes.
    """

    train_sampler = None

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset) if self.train_sampler is None else self.train_sampler


def use_one_gpu(arguments) -> None:
    """Keep the Trainer from `nn.DataParallel`, which splits every batch over the GPUs: a packed row has but one line."""
    if arguments.n_gpu > 1:
        print(
            f"这台机器有 {arguments.n_gpu} 块 GPU，这里只用一块 [one GPU is used]。"
            "几块一起：accelerate launch --num_processes 2 -m helpers.finetune ...",
            flush=True,
        )
        arguments._n_gpu = 1


def takes_any_mask(model) -> bool:
    """Whether the model's attention heeds a mask of tokens by tokens, as `pack` makes it; flash attention does not."""
    return model.config._attn_implementation == "sdpa"
