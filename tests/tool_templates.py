"""Chat templates that tell of tools in every way that is known, and in some that are not."""

from __future__ import annotations

from typing import Any

from tests.conftest import build_tokenizer

HEAD = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EACH = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
TEMPLATES = {
    # With the name first, as Qwen's; with the name last, as the first ones that did this.
    "hermes": HEAD + TURN + EACH + '\n<tool_call>\n{"name": "{{ f.name }}", "arguments": '
    "{{ f.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n" + TAIL,
    "hermes, name last": HEAD + TURN + EACH + '\n<tool_call>\n{ "arguments": '
    '{{ f.arguments | tojson }}, "name": "{{ f.name }}"}\n</tool_call> {% endfor %}<|im_end|>\n'
    + TAIL,
    "llama3": HEAD
    + "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}"
    '{% endif %}<|im_start|>assistant\n{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}{% else %}'
    + TURN
    + "{% endif %}<|im_end|>\n"
    + TAIL,
    "mistral": "{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.last or tools and "
    "messages[loop.index0 + 1].tool_calls %}[AVAILABLE]{{ tools | tojson }}{% endif %}[INST] "
    "{{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] ["
    + EACH
    + "{% if c.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
    '{{ (f | tojson)[:-1] }}, "id": "{{ c.id }}"}{{ \', \' if not loop.last }}{% endfor %}]<|im_end|>'
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    "coder": HEAD
    + TURN
    + EACH
    + "<tool_call><function={{ f.name }}>{% for k, v in f.arguments.items() "
    "%}<parameter={{ k }}>{{ v }}</parameter>{% endfor %}</function></tool_call>{% endfor %}<|im_end|>\n"
    + TAIL,
    "untold": "{% for m in messages %}" + TURN + "<|im_end|>\n" + TAIL,
    "silent": HEAD + TURN + "<|im_end|>\n" + TAIL,
}
MARKS = {"hermes": ("<tool_call>", "</tool_call>"), "mistral": ("[TOOL_CALLS]",)}


def tokenizer_of(template: str, *, marks: str = "text") -> Any:
    """Return a tokenizer whose marks are ordinary text, added tokens, or special ones."""
    tokenizer = build_tokenizer(every_byte=True)
    tokenizer.chat_template = TEMPLATES[template]
    added: Any = list(MARKS.get(template, ()))
    if marks == "special":
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [*tokenizer.all_special_tokens, *added]}
        )
    elif marks == "added":
        tokenizer.add_tokens(added)
    return tokenizer
