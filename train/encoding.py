"""From a triplet to the token ids that a model is trained on: those of inference, then the answer and its end.

The loss counts the answer's tokens only. They are found by where they are put, never by searching a string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from submission.backends.transformers.tokenizer import HfTokenizer
from submission.errors import BackendError, UserError
from submission.prompts.encoding import ChatEncoder
from submission.prompts.templates import Template
from submission.types import Triplet

IGNORED = -100
"""The label of a token that the loss leaves out (torch.nn.CrossEntropyLoss, `ignore_index`)."""
_ANSWER = "\ue000"


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """Token ids of a prompt and its answer, which begins at index `answer_from`."""

    ids: tuple[int, ...]
    answer_from: int

    @property
    def labels(self) -> list[int]:
        """The ids, with `IGNORED` in the place of the prompt's."""
        return [IGNORED] * self.answer_from + list(self.ids[self.answer_from :])


class AnswerEncoder:
    """Encodes triplets for one tokenizer and template.

    Args:
        tokenizer: of the model.
        template: the one that will be used for predicting.
        max_tokens: of a prompt and its answer; longer texts are cut as they are for predicting.
    """

    def __init__(self, tokenizer: HfTokenizer, template: Template, max_tokens: int) -> None:
        self._encoder = ChatEncoder(tokenizer, max_tokens)
        self._template = template
        self._max_tokens = max_tokens
        self.end = end_of_answer(tokenizer)

    def encode(self, triplet: Triplet, shots: Sequence[Triplet] = ()) -> TrainingExample | None:
        """Encode a triplet; None if it does not fit, or if the template begins answers otherwise than this prompt."""
        chat = self._template.render(triplet.pair, shots)
        answer = triplet.rewrite_prompt
        if chat.prefix:
            if not answer.startswith(chat.prefix):
                return None
            answer = answer.removeprefix(chat.prefix)
        ids = [*self._encoder.encode_continuation(answer), self.end]
        try:
            prompt = self._encoder.encode_for(chat, len(ids)).ids
        except BackendError:
            return None
        return TrainingExample((*prompt, *ids), len(prompt))


def end_of_answer(tokenizer: HfTokenizer) -> int:
    """The token that ends an assistant's turn: what the chat template puts behind one, or the end of text.

    Raises:
        UserError: there is none.
    """
    hf = tokenizer.hf
    if hf.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        behind = str(hf.apply_chat_template(turns, tokenize=False)).rpartition(_ANSWER)[2]
        found = [(behind.index(name), -len(name), special.id) for name, special in tokenizer.specials.items()
                 if name in behind]  # fmt: skip
        if found:
            return min(found)[2]
    if hf.eos_token_id is None:
        raise UserError("the tokenizer has neither an end of turn nor an end of text: a model could not learn to stop")
    return int(hf.eos_token_id)
