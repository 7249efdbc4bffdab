"""Probabilities of texts: one pass for the hidden states, then the output head in pieces.

Logits of a 256k vocabulary take a megabyte a token in 32 bits, so those of a batch are never held together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from submission.backends.transformers.generation import NOT_FINITE
from submission.backends.transformers.items import Text
from submission.backends.transformers.prefixes import Prefixes
from submission.types import Failure

_BYTES_PER_LOGIT = 16  # as the head gives it, bounded, in float32, and its exponential


class Scorer:
    """Scores batches of texts.

    Args:
        model: of transformers.
        prefixes: its common beginnings.
        pad: token that is masked out.
        room: bytes that logits may take at the moment.
    """

    def __init__(self, model: Any, prefixes: Prefixes, pad: int, room: Callable[[], int]) -> None:
        self._model, self._prefixes, self._pad, self._room = model, prefixes, pad, room
        self._vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
        self._body, self._head = _parts(model, self._vocabulary)

    @property
    def outputs(self) -> int | None:
        """Tokens whose logits a batch may bring; None if the head runs in pieces."""
        return None if self._head is not None else self._piece()

    def score(self, batch: list[Text]) -> None:
        """Sum the log-probabilities of each text's scored tokens."""
        import torch

        shared = self._prefixes.common(batch)
        width = max(len(text.ids) for text in batch) - 1  # the last token predicts nothing that is asked
        ids = torch.full((len(batch), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(batch):
            ids[row, : len(text.ids) - 1] = torch.from_numpy(text.ids[:-1]).long()
            mask[row, : len(text.ids) - 1] = 1
        device = self._model.device
        fed = {
            "input_ids": ids[:, shared:].to(device),
            "attention_mask": mask.to(device),
            "position_ids": torch.arange(shared, width, device=device).expand(len(batch), -1),
            "past_key_values": self._prefixes.cache(batch[0].ids[:shared], len(batch)),
            "use_cache": shared > 0,
        }
        found = self._in_pieces(batch, fed, shared) if self._head is not None else self._at_once(batch, fed, width)
        for text, logprobs in zip(batch, found, strict=True):
            text.total = float(logprobs.double().sum())
            text.failure = None if math.isfinite(text.total) else Failure(NOT_FINITE)

    def _in_pieces(self, batch: list[Text], fed: dict[str, Any], shared: int) -> Any:
        """Log-probabilities of the scored tokens, by text; the head runs on the positions that predict them alone."""
        import torch

        hidden = self._body(**fed).last_hidden_state
        places = [(row, place - 1 - shared) for row, text in enumerate(batch)
                  for place in range(text.scored_from, len(text.ids))]  # fmt: skip
        row, place = torch.tensor(places, device=hidden.device).T
        hidden = hidden[row, place]
        tokens = torch.cat([torch.from_numpy(text.ids[text.scored_from :]).long() for text in batch])
        piece = self._piece()
        found = torch.cat([
            _chosen(self._head(part), chosen)
            for part, chosen in zip(torch.split(hidden, piece), torch.split(tokens, piece), strict=True)
        ])  # fmt: skip
        return torch.split(found, [text.outputs for text in batch])

    def _at_once(self, batch: list[Text], fed: dict[str, Any], width: int) -> Any:
        """The same by a head that is not known apart from its model."""
        import torch

        first = min(text.scored_from for text in batch) - 1
        logits = self._model(**fed, logits_to_keep=width - first).logits
        return [
            _chosen(
                logits[row, text.scored_from - 1 - first : len(text.ids) - 1 - first],
                torch.from_numpy(text.ids[text.scored_from :]).long(),
            )
            for row, text in enumerate(batch)
        ]

    def _piece(self) -> int:
        """Tokens whose logits there is room for."""
        return max(1, self._room() // (_BYTES_PER_LOGIT * self._vocabulary))


def _chosen(logits: Any, tokens: Any) -> Any:
    """log softmax(logits)[tokens], natural log, for logits of shape (tokens, vocabulary), on the CPU."""
    logits = logits.float()
    return (logits.gather(1, tokens.to(logits.device)[:, None])[:, 0] - logits.logsumexp(dim=-1)).cpu()


def _parts(model: Any, vocabulary: int) -> tuple[Any, Any]:
    """A model's body and its head, which makes logits of hidden states; no head where they are not the whole of it.

    Some models do more to their logits than a linear layer and the bound of Gemma-2: the parts are tried.
    """
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body, linear = inner.base_model, inner.get_output_embeddings()
    bound = getattr(inner.config.get_text_config(decoder=True), "final_logit_softcapping", None)

    def head(hidden: Any) -> Any:
        logits = linear(hidden)
        return logits if bound is None else torch.tanh(logits / bound) * bound

    if body is inner or linear is None:
        return None, None
    with torch.inference_mode():
        ids = torch.tensor([[vocabulary * part // 9 for part in range(1, 9)]], device=model.device)
        expected = model(input_ids=ids).logits.float()
        try:
            found = head(body(input_ids=ids, use_cache=False).last_hidden_state).float().to(expected.device)
        except (TypeError, RuntimeError, AttributeError):  # the body takes or gives something else
            return None, None
    alike = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    return (body, head) if alike else (None, None)
