"""The prompt of a chat: a user's message in the form that the tokenizer's template gives it."""

from collections.abc import Sequence
from pathlib import Path

from mf_train.errors import UserError


class ChatTokenizer:
    """The folder's `transformers` tokenizer, with what generation needs of `mf_train.data.tokenizer.Tokenizer`.

    `encode` takes a user's message and gives the ids of the template with it, up to where the answer begins; special
    tokens of the template are themselves. Raises UserError where the tokenizer has no template.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast  # what every model that was converted has

        try:
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder}: has no tokenizer that can be read ({str(error).splitlines()[0]}); leave --chat out"
            ) from None
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{folder}: its tokenizer has no chat template: leave --chat out, or put the template that the "
                "model was trained with into chat_template.jinja"
            )
        self.end_of_text_id = int(self._tokenizer.eos_token_id)
        self.vocab_size = len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        from jinja2 import TemplateError

        try:
            written = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise UserError(f"the chat template refuses the message: {error}; correct the template") from None
        ids = self._tokenizer(written, add_special_tokens=False, split_special_tokens=False)
        return list(ids["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids))
