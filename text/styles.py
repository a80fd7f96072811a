"""Chat styles: how each family of chat models writes a conversation, as data; and their templates in Jinja.

    plaingpt   <|endoftext|><|user|>Hi<|end|><|assistant|>Hello<|end|>
    chatml     <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    llama2     <s>[INST] Hi [/INST] Hello </s>
    llama3     <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\nHi<|eot_id|> ...
    baichuan2  <reserved_106>Hi<reserved_107>Hello</s>
    alpaca     ### Instruction:\\nHi\\n\\n### Response:\\nHello<|endoftext|>\\n\\n

Models are published with a Jinja template that writes their conversations. This project runs no Jinja: `detect_style`
finds out which style a template is, `default_system` which system message it inserts, and `jinja` writes one.
"""

import json
import re
from collections.abc import Container
from dataclasses import dataclass

PLAINGPT = "plaingpt"
TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")  # of our own style
END_OF_TEXT = ""  # stands for the tokenizer's end-of-text token, whatever its name


@dataclass(frozen=True)
class Style:
    """How a family of models writes a conversation. The pairs are the text before and after a message.

    The names in `special` are special tokens where they occur in these texts; everything else is ordinary text.
    """

    special: tuple[str, ...]
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]  # the second one follows the end token
    end: str  # the token that ends an answer
    begin: tuple[str, ...] = ()  # the first of these tokens that there is begins the conversation; see `start_id`
    padding: tuple[str, str] = ("", "")  # around an answer, and a part of it: the model writes it
    strip: bool = False  # whether messages lose the white space at their ends
    merge: bool = False  # whether the system message, with the texts around it, is a part of the first user message
    markers: tuple[str, ...] = ()  # a Jinja template of this style contains all of these
    excluded: tuple[str, ...] = ()  # and none of these, which belong to similar styles


STYLES: dict[str, Style] = {
    PLAINGPT: Style(
        special=TOKENS,
        system=("<|system|>", "<|end|>"),
        user=("<|user|>", "<|end|>"),
        assistant=("<|assistant|>", ""),
        end="<|end|>",
        begin=(END_OF_TEXT,),
    ),
    "chatml": Style(  # Qwen, SmolLM2
        special=("<|im_start|>", "<|im_end|>"),
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "\n"),
        end="<|im_end|>",
        markers=("<|im_start|>", "<|im_end|>"),
        excluded=("<|im_sep|>", "bos_token"),
    ),
    "llama2": Style(
        special=("<s>", "</s>"),
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        user=("<s>[INST] ", " [/INST]"),
        assistant=("", ""),
        end="</s>",
        padding=(" ", " "),
        strip=True,
        merge=True,
        markers=("[INST]", "<<SYS>>", "bos_token"),
    ),
    "llama3": Style(
        special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", ""),
        end="<|eot_id|>",
        begin=("<|begin_of_text|>",),
        strip=True,
        markers=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "baichuan2": Style(
        special=("<reserved_106>", "<reserved_107>", "</s>"),
        system=("", ""),
        user=("<reserved_106>", ""),
        assistant=("<reserved_107>", ""),
        end="</s>",
        markers=("<reserved_106>", "<reserved_107>"),
    ),
    "alpaca": Style(
        special=(),
        system=("", "\n\n"),
        user=("### Instruction:\n", "\n\n"),
        assistant=("### Response:\n", "\n\n"),
        end=END_OF_TEXT,
        begin=("<s>", END_OF_TEXT),
        strip=True,
        markers=("### Instruction:", "### Response:"),
    ),
}  # fmt: skip

# What `jinja` writes at the beginning of a template, so that `detect_style` knows it again
SIGNATURE = re.compile(r"\{# chat style: (\w+) #\}")
OUR_DEFAULT = re.compile(r'\{% set system = ("(?:[^"\\]|\\.)*") %\}')
# The system message that a template of the style "chatml" writes if the conversation has none, within one literal
CHATML_DEFAULT = re.compile(
    r"""(['"])<\|im_start\|>system(?:\\n|\n)((?:(?!\1)[^\\]|\\.)+?)<\|im_end\|>""", flags=re.DOTALL
)


def detect_style(chat_template: str | None, special_tokens: Container[str]) -> str | None:
    """Return the style of a Jinja chat template, None if it is none of ours.

    special_tokens: the tokenizer's, by name; the style's must be among them. Parts of a template for other purposes
    are not looked at: tools, the thoughts of Qwen 3, and the dates that Llama 3.1 writes into its system message.
    """
    chat_template = chat_template or ""
    if signature := SIGNATURE.match(chat_template):
        found = [signature[1]] if signature[1] in STYLES else []
    else:
        found = [name for name, style in STYLES.items() if _has_markers(chat_template, style)]
    for name in found:
        if all(token in special_tokens for token in STYLES[name].special):
            return name
    return None


def _has_markers(chat_template: str, style: Style) -> bool:
    present = all(marker in chat_template for marker in style.markers)
    return bool(style.markers) and present and all(marker not in chat_template for marker in style.excluded)


def default_system(chat_template: str | None) -> str:
    """Return the system message that a Jinja chat template writes if the conversation has none; "" if there is none."""
    chat_template = chat_template or ""
    if SIGNATURE.match(chat_template):
        ours = OUR_DEFAULT.search(chat_template)
        return json.loads(ours[1]) if ours else ""
    if literal := CHATML_DEFAULT.search(chat_template):  # read as Jinja reads the escapes of a literal
        return literal[2].encode("ascii", "backslashreplace").decode("unicode-escape")
    return ""


def jinja(name: str, default_system: str, begin: str, end: str) -> str:
    """Return a Jinja chat template for which transformers' apply_chat_template gives the ids of `Template.render`.

    At the end of a prompt, `Template` encodes text apart where transformers might not (see text/chat.py).
    begin, end: the names of the tokens that begin a conversation ("" for none) and end an answer.
    """
    style = STYLES[name]
    trim = " | trim" if style.strip else ""

    def write(pair: tuple[str, str], content: str) -> str:
        return f"{{{{ {_literal(pair[0])} + {content}{trim} + {_literal(pair[1])} }}}}"

    system, merged = "{% if system is not none %}" + write(style.system, "system") + "{% endif %}", ""
    if style.merge:
        before, after = map(_literal, style.system)
        whole = f"{before} + system + {after} + content"
        system, merged = "", f"{{% if loop.first and system is not none %}}{{% set content = {whole} %}}{{% endif %}}"
    (before, after), (left, right) = style.assistant, style.padding
    return "".join([
        f"{{# chat style: {name} #}}",
        "{% if messages[0]['role'] == 'system' %}",
        "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}",
        f"{{% else %}}{{% set system = {_literal(default_system) if default_system else 'none'} %}}",
        f"{{% set turns = messages %}}{{% endif %}}{{{{ {_literal(begin)} }}}}",
        system,
        "{% for message in turns %}{% set content = message['content'] %}",
        "{% if message['role'] == 'user' %}", merged, write(style.user, "content"),
        "{% else %}", write((before + left, right + end + after), "content"),
        "{% endif %}{% endfor %}",
        f"{{% if add_generation_prompt %}}{{{{ {_literal(before)} }}}}{{% endif %}}",
    ])  # fmt: skip


def _literal(text: str) -> str:
    """Return the text as a string literal of Jinja, whose escapes are those of Python, and so JSON's."""
    return json.dumps(text, ensure_ascii=False)
