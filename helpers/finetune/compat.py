"""The private names of transformers that this folder leans on, as read in 5.23.0; a test says when one is gone."""

from transformers import Trainer

NAMES = {
    "transformers:Trainer._get_train_sampler": "rows would come in another order in every process",
    "transformers:PreTrainedConfig._attn_implementation": "nobody knows whether packed rows may be used",
}


class OrderedTrainer(Trainer):
    """A Trainer that takes the training rows in the order of `train_sampler`; None leaves the order to transformers.

    The public way, `get_train_dataloader`, would have to do again what accelerate needs for several processes. Without
    `_get_train_sampler`, rows would come in transformers' own order, which is another one in every process.
    """

    train_sampler = None

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset) if self.train_sampler is None else self.train_sampler


def takes_any_mask(model) -> bool:
    """Whether the model's attention heeds a mask of tokens by tokens, as `pack` makes it; flash attention does not."""
    return model.config._attn_implementation == "sdpa"
