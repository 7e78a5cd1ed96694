"""What is learned of a conversation, against what was written by hand for published templates."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hive_vision.conversation import Turn
from hive_vision.models.chat_templates import ConversationFormat
from tests.conftest import make_tokenizer
from tests.models import published_templates as templates


def chat_tokenizer(
    template: str | None, *, adds_start: bool = False, pad: bool = True
) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of all templates, which are one token each."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens({"additional_special_tokens": templates.SPECIAL})
    tokenizer.chat_template = template
    if adds_start:
        start = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start[0]} $A", special_tokens=[start]
        )
    if not pad:
        tokenizer.pad_token = None
    return tokenizer


def turns(*contents: str, system: str | None = None) -> list[Turn]:
    said = [] if system is None else [Turn(role="system", content=system)]
    roles = ("user", "assistant")
    return said + [Turn(role=roles[n % 2], content=c) for n, c in enumerate(contents)]


def shown(tokenizer: Any, form: ConversationFormat, conversation: list[Turn]) -> str:
    """The whole text, what is learned in double braces."""
    encoded = form.encode(conversation)
    assert encoded.problem == ""
    text, place = "", 0
    for start, stop in encoded.learned:
        text += tokenizer.decode(list(encoded.input_ids[place:start]))
        text += "{{" + tokenizer.decode(list(encoded.input_ids[start:stop])) + "}}"
        place = stop
    return text + tokenizer.decode(list(encoded.input_ids[place:]))


TWO = turns("<image>\nwhat?", "a red square", "where?", "left")
CASES = {
    "llama 3": (
        templates.LLAMA_3,
        {"adds_start": True},
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nwhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{{a red square<|eot_id|>}}"
        "<|start_header_id|>user<|end_header_id|>\n\nwhere?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{{left<|eot_id|>}}",
    ),
    "llama 3.2": (
        templates.LLAMA_3_2,
        {"adds_start": True, "pad": False},
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nwhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{{a red square<|eot_id|>}}"
        "<|start_header_id|>user<|end_header_id|>\n\nwhere?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{{left<|eot_id|>}}",
    ),
    "qwen 2.5": (
        templates.QWEN_2_5,
        {},
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n"
        "<|im_start|>user\n<image>\nwhat?<|im_end|>\n"
        "<|im_start|>assistant\n{{a red square<|im_end|>}}\n"
        "<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n{{left<|im_end|>}}\n",
    ),
    "qwen 3": (
        templates.QWEN_3,
        {},
        "<|im_start|>user\n<image>\nwhat?<|im_end|>\n"
        "<|im_start|>assistant\n{{a red square<|im_end|>}}\n"
        "<|im_start|>user\nwhere?<|im_end|>\n"
        "<|im_start|>assistant\n{{<think>\n\n</think>\n\nleft<|im_end|>}}\n",
    ),
    "smollm 2": (
        templates.SMOLLM_2,
        {},
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n"
        "<|im_start|>user\n<image>\nwhat?<|im_end|>\n"
        "<|im_start|>assistant\n{{a red square<|im_end|>}}\n"
        "<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n{{left<|im_end|>}}\n",
    ),
    "gemma, no start from the tokenizer": (
        templates.GEMMA,
        {},
        "<s><start_of_turn>user\n<image>\nwhat?<end_of_turn>\n"
        "<start_of_turn>model\n{{a red square<end_of_turn>}}\n"
        "<start_of_turn>user\nwhere?<end_of_turn>\n<start_of_turn>model\n{{left<end_of_turn>}}\n",
    ),
    "llava": (
        "llava",
        {"adds_start": True, "pad": False},
        "<s>USER: <image>\nwhat? ASSISTANT:{{ a red square</s>}}"
        "USER: where? ASSISTANT:{{ left</s>}}",
    ),
    "turns that never end": (
        templates.ENDLESS,
        {},
        "### user: <image>\nwhat?\n### assistant:{{ a red square</s>}}\n"
        "### user: where?\n### assistant:{{ left</s>}}\n",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_learned(name: str) -> None:
    template, options, expected = CASES[name]
    own = None if template == "llava" else template
    tokenizer = chat_tokenizer(own, **options)
    form = ConversationFormat(tokenizer, "llava" if own is None else None)
    assert shown(tokenizer, form, TWO) == expected
    # A model that goes on from the prompt is asked just as it was taught.
    encoded = form.encode(TWO)
    for count, (start, _) in zip((1, 3), encoded.learned, strict=True):
        prompt = form.render(TWO[:count], add_generation_prompt=True)
        assert tuple(tokenizer(prompt)["input_ids"]) == encoded.input_ids[:start]


@pytest.mark.parametrize("name", CASES)
def test_as_it_is_exported(name: str) -> None:
    """By the tokenizer alone, with contents as lists, and one start token at most."""
    template, options, _ = CASES[name]
    own = None if template == "llava" else template
    tokenizer = chat_tokenizer(own, **options)
    form = ConversationFormat(tokenizer, "llava" if own is None else None)
    exported = copy.deepcopy(tokenizer)
    exported.chat_template = form.template
    lists = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red square"}]},
        {"role": "user", "content": [{"type": "text", "text": "where?"}]},
        {"role": "assistant", "content": "left"},
    ]
    text = exported.apply_chat_template(lists, tokenize=False)
    assert tuple(exported(text)["input_ids"]) == form.encode(TWO).input_ids
    assert exported(text)["input_ids"].count(exported.bos_token_id) <= 1
    assert form.end_token in tokenizer.get_vocab()


WORDS = st.text(st.characters(blacklist_categories=["Cs", "Co"]), max_size=12).map(str.strip)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(CASES)),
    st.lists(st.tuples(WORDS.filter(bool), WORDS.filter(bool)), min_size=1, max_size=4),
)
def test_answers_and_only_answers_are_learned(name: str, said: list[tuple[str, str]]) -> None:
    """Whatever is said, also words of the template."""
    template, options, _ = CASES[name]
    own = None if template == "llava" else template
    tokenizer = chat_tokenizer(own, **options)
    form = ConversationFormat(tokenizer, "llava" if own is None else None)
    encoded = form.encode(turns(*(text for pair in said for text in pair)))
    assert encoded.problem == ""
    learned = [
        tokenizer.decode(list(encoded.input_ids[start:stop])).removeprefix(
            "<think>\n\n</think>\n\n"
        )
        for start, stop in encoded.learned
    ]
    expected = [answer + form.end_token for _, answer in said]
    assert [text.removeprefix(" ") for text in learned] == [
        tokenizer.decode(tokenizer(answer, add_special_tokens=False)["input_ids"]).removeprefix(" ")
        for answer in expected
    ]


def test_a_system_message_where_it_is_not_taken() -> None:
    form = ConversationFormat(chat_tokenizer(templates.GEMMA))
    problem = form.encode(turns("what?", "a square", system="be brief")).problem
    assert problem == "the chat template does not take it: System role not supported"


@pytest.mark.parametrize("conversation", [turns("what?"), turns("what?", ""), []])
def test_nothing_to_learn_from(conversation: list[Turn]) -> None:
    form = ConversationFormat(chat_tokenizer(templates.QWEN_2_5))
    encoded = form.encode(conversation)
    assert encoded.problem == "no answer to learn from"
    assert encoded.input_ids == ()


def test_one_empty_answer_among_others_is_not_learned() -> None:
    tokenizer = chat_tokenizer(templates.QWEN_2_5)
    form = ConversationFormat(tokenizer)
    text = shown(tokenizer, form, turns("a", "", "b", "left"))
    assert text.count("{{") == 1
    assert "{{left<|im_end|>}}" in text


def test_a_template_that_leaves_answers_out() -> None:
    form = ConversationFormat(chat_tokenizer(templates.QWEN_2_5))
    form.template = form.template.replace(
        "messages %}\n    {%- if (message", "messages[-1:] %}{%- if (message"
    )
    assert "changes or leaves out answers" in form.encode(TWO).problem


class TestRefusals:
    def test_no_template(self) -> None:
        with pytest.raises(ValueError, match="has no chat template; give chat_template=llava"):
            ConversationFormat(chat_tokenizer(None))

    def test_no_end(self) -> None:
        tokenizer = chat_tokenizer(templates.ENDLESS)
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match=r"no answer could ever end; set tokenizer\.eos_token"):
            ConversationFormat(tokenizer)

    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}",
            templates.SMOLLM_2.replace("{{ '<|im_start|>assistant\n' }}", "{{ 'Answer:' }}"),
        ],
        ids=["none", "another"],
    )
    def test_another_prompt_than_it_learned(self, template: str) -> None:
        with pytest.raises(ValueError, match="generation prompt is not how its answers begin"):
            ConversationFormat(chat_tokenizer(template))

    def test_a_template_that_fails(self) -> None:
        with pytest.raises(ValueError, match="fails on a question with an answer"):
            ConversationFormat(chat_tokenizer("{{ raise_exception('no') }}"))

    def test_an_end_behind_every_text(self) -> None:
        tokenizer = chat_tokenizer(templates.QWEN_2_5)
        end = (tokenizer.eos_token, tokenizer.eos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end[0]}", special_tokens=[end]
        )
        with pytest.raises(ValueError, match="add_eos_token"):
            ConversationFormat(tokenizer)
