"""Common beginnings of prompts: computed once, kept for the next batch, copied for every row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from submission.backends.window import common_length

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from submission.backends.transformers.items import Prompt, Text

_WORTH_SHARING = 16  # tokens of a common beginning below which it is not computed apart


class Prefixes:
    """The cache of the last common beginning, and what may be done with caches of this model.

    A layer with a sliding window drops the tokens before it, and padding may not lie inside the window. So beginnings
    are shared in batches that stay below the window, where such a layer is one like all others.

    Args:
        model: of transformers.
        token: any of its vocabulary.
    """

    def __init__(self, model: Any, token: int) -> None:
        self._model = model
        self._held: tuple[NDArray[np.int32], Any] | None = None
        self.repeatable, self._below = self._look_at_cache(token)
        """Whether rows of a cache may be copied, for several answers to a prompt."""

    def shareable(self, tokens: int) -> bool:
        """Whether rows of so many tokens, padding and answers included, may share a beginning."""
        return tokens < self._below

    def common(self, items: Sequence[Prompt] | Sequence[Text]) -> int:
        """Tokens at the beginning of different items that are computed once for all of them."""
        if not self.shareable(max(item.need for item in items)):
            return 0
        first = items[0].ids
        most = min(item.most_shared for item in items)
        most = min([most, *(common_length(first, item.ids) for item in items[1:])])
        if len(items) == 1:  # pays only if it is there already
            most = min(most, common_length(first, self._held[0])) if self._held else 0
        return most if most >= _WORTH_SHARING else 0

    def cache(self, ids: NDArray[np.int32], rows: int) -> Any:
        """A cache that holds `ids` in each of so many rows; None for no ids."""
        import torch

        if not len(ids):
            return None
        held = self._held[0] if self._held else ids[:0]
        if len(held) < len(ids) or common_length(held, ids) < len(ids):
            fed = torch.tensor([ids.tolist()], device=self._model.device)
            made = self._model(input_ids=fed, use_cache=True, logits_to_keep=1).past_key_values
            self._held = (ids, made)
        assert self._held is not None
        cache = copy.deepcopy(self._held[1])
        if len(self._held[0]) > len(ids):
            cache.crop(len(ids) - len(self._held[0]))
        cache.batch_repeat_interleave(rows)
        return cache

    def forget(self) -> None:
        """Let the memory go."""
        self._held = None

    def _look_at_cache(self, token: int) -> tuple[bool, float]:
        """Whether every layer keeps a list of keys and values, and the tokens below which none of them drops any."""
        import torch
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        with torch.inference_mode():
            fed = torch.tensor([[token]], device=self._model.device)
            cache = self._model(input_ids=fed, use_cache=True).past_key_values
        config = self._model.config.get_text_config(decoder=True)
        chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())  # padding shifts the chunks
        if (
            chunked
            or not isinstance(cache, DynamicCache)
            or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        ):
            return False, 0.0
        windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        return True, min(windows, default=float("inf"))
