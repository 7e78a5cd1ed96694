"""Conversations to token ids: what a chat template writes, and which of its tokens are learned.

Learned are the assistant's turns with the token that ends them. They are found in the rendered
text, whatever the template writes between them, and never by searching token ids.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

from jinja2 import TemplateError

from hive_vision.conversation import EncodedConversation, Turn
from hive_vision.models.self_attention_baseline import image_token_id

# LLaVA's own (Vicuna's): for language models without a template.
LLAVA_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + ' ' }}
{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' + message['content'] + eos_token }}
{%- else -%}{{ message['content'] + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

# Stands before a text-only model's template. Lists of contents become text, and what depends on the
# day does not: Llama 3.2 writes today's date, with which no training could be repeated.
_PRELUDE = """\
{%- set plain = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set written = namespace(text='') -%}
{%- if message['content'] is string -%}{%- set written.text = message['content'] -%}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set written.text = written.text + '<image>\\n' -%}
{%- elif part['type'] == 'text' -%}{%- set written.text = written.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}{%- endif -%}
END_OF_TURN
{%- set plain.messages = plain.messages + [dict(message, content=written.text)] -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
{%- set date_string = '26 Jul 2024' -%}
"""
_END = """\
{%- if message['role'] == 'assistant' -%}
{%- set written.text = written.text + eos_token -%}{%- endif -%}"""
# Processors add the start token to a text; where the template does as well there would be two.
_NO_START = "{%- set bos_token = '' -%}\n"

# Private characters, which no text has: they stand where the assistant's turns begin and end.
_MARK = "\ue000{}\ue001"
_MARKED = re.compile("\ue000\\d+\ue001")


class ConversationFormat:
    """How one tokenizer's chat template writes conversations.

    Args:
        tokenizer: Of the language model; it gets an ``<image>`` token if it has none.
        template: A chat template, or ``llava`` for LLaVA's own; the tokenizer's if not given.

    Attributes:
        template: The chat template as it is exported: for content lists too, with one start token,
            and with an end token after every turn of the assistant.
        end_token: What ends a turn of the assistant.

    Raises:
        ValueError: If there is no template, or one that cannot be trained and then used alike.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"a {type(tokenizer).__name__} does not say which token is which text; save it as "
                "a fast tokenizer (tokenizer.json)"
            )
        own = LLAVA_TEMPLATE if template == "llava" else template or tokenizer.chat_template
        if not isinstance(own, str):
            raise ValueError(
                "the language model's tokenizer has no chat template; give chat_template=llava, or "
                "a language model that was trained to chat"
            )
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id(tokenizer)
        starts = _adds_start(tokenizer)
        self.template = (_NO_START if starts else "") + _PRELUDE.replace("END_OF_TURN\n", "") + own
        end = self._end_of_turn()
        if end is None:
            if tokenizer.eos_token is None:
                raise ValueError(
                    "neither the chat template nor the tokenizer ends a turn with a special token, "
                    "so no answer could ever end; set tokenizer.eos_token"
                )
            prelude = _PRELUDE.replace("END_OF_TURN", _END)
            self.template = (_NO_START if starts else "") + prelude + own
            end = tokenizer.eos_token
        self.end_token: str = end
        self.header = self._header()

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """Write a conversation as text.

        Args:
            turns: The conversation.
            add_generation_prompt: Whether the assistant is to go on.

        Raises:
            jinja2.TemplateError: If the template does not take it.
        """
        text: str = self.tokenizer.apply_chat_template(
            list(turns),
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    def encode(self, turns: Sequence[Turn]) -> EncodedConversation:
        """Tokenize a conversation; what cannot be is said in ``problem``."""
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        if not any(answers):
            return EncodedConversation(problem="no answer to learn from")
        marks = iter(range(len(answers)))
        marked = [
            Turn(role=turn["role"], content=_MARK.format(next(marks)))
            if turn["role"] == "assistant"
            else turn
            for turn in turns
        ]
        try:
            text, skeleton = self.render(turns), self.render(marked)
        except (TemplateError, TypeError) as error:
            reason = " ".join(str(error).split())
            return EncodedConversation(problem=f"the chat template does not take it: {reason}")
        spans = self._spans(text, _MARKED.split(skeleton), answers)
        if spans is None:
            return EncodedConversation(problem="the chat template changes or leaves out answers")
        encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        learned = tuple(
            found for span in spans if (found := _tokens_of(span, encoded["offset_mapping"]))
        )
        return EncodedConversation(tuple(encoded["input_ids"]), learned)

    def _spans(
        self, text: str, pieces: Sequence[str], answers: Sequence[str]
    ) -> list[tuple[int, int]] | None:
        """Find what is learned of a text: characters ``[start, stop)``; None if it is not there."""
        if len(pieces) != len(answers) + 1 or not text.startswith(pieces[0]):
            return None
        place, spans = len(pieces[0]), []
        for before, answer, after in zip(pieces, answers, pieces[1:], strict=False):
            # What follows the prompt is learned too, such as an empty place for thoughts.
            header = before.rfind(self.header)
            start = place if header < 0 else place - len(before) + header + len(self.header)
            place += len(answer)
            if text[place - len(answer) : place] != answer or not text.startswith(after, place):
                return None
            gap = len(after) - len(after.lstrip())
            ends = after.startswith(self.end_token, gap)
            if answer:
                spans.append((start, place + gap + len(self.end_token) if ends else place))
            place += len(after)
        return spans if place == len(text) else None

    def _end_of_turn(self) -> str | None:
        """Find the special token that the template writes after an answer, if there is one."""
        try:
            text = self.render([_said("user", "question"), _said("assistant", _MARK.format(0))])
        except (TemplateError, TypeError) as error:
            raise ValueError(
                "the chat template fails on a question with an answer: "
                f"{' '.join(str(error).split())}; give chat_template=llava or a file"
            ) from error
        after = _MARKED.split(text)[-1].lstrip()
        special = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        found = [token for token in special if after.startswith(token)]
        return max(found, key=len, default=None)

    def _header(self) -> str:
        """Find what the template writes to have the assistant go on.

        Raises:
            ValueError: If turns of the assistant do not begin with it.
        """
        question = [_said("user", "question")]
        asked, prompt = self.render(question), self.render(question, add_generation_prompt=True)
        answered = self.render([*question, _said("assistant", "answer")])
        header = prompt.removeprefix(asked)
        if not header or not prompt.startswith(asked) or not answered.startswith(prompt):
            raise ValueError(
                "the chat template's generation prompt is not how its answers begin, so a model "
                "trained on it would be asked in another way; give chat_template=llava or a file"
            )
        return header


def _said(role: Literal["user", "assistant"], content: str) -> Turn:
    return Turn(role=role, content=content)


def _adds_start(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a start token before any text.

    Raises:
        ValueError: If it puts an end after it, as no prompt can have.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    if ids[len(ids) - len(plain) :] != plain:
        raise ValueError(
            "the tokenizer puts special tokens behind every text, so no prompt could be gone on "
            "with; set its add_eos_token to false"
        )
    return len(ids) > len(plain)


def _tokens_of(span: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Give the tokens that have characters of a span, as ``[start, stop)``."""
    start, stop = span
    inside = [n for n, (first, last) in enumerate(offsets) if last > start and first < stop]
    return (inside[0], inside[-1] + 1) if inside else None
