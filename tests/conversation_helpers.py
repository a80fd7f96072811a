"""Rows of the public forms of conversations with what they stand for, and rows that must be refused, with reasons."""

import json

NAMES = {"s": "system", "u": "user", "a": "assistant"}


def talk(*turns):
    """talk("u: Hi", "a: Ho"): messages; "a0: Ho" has weight 0, "a1: Ho" weight 1."""
    messages = []
    for turn in turns:
        who, _, content = turn.partition(": ")
        messages.append({"role": NAMES[who[0]], "content": content} | ({"weight": int(who[1])} if who[1:] else {}))
    return messages


def share(*turns):
    return [dict(zip(("from", "value"), turn, strict=True)) for turn in turns]


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


HELLO = talk("u: Hi", "a: Ho")

# A row as its data set has it, the messages that it stands for, and the fields that are left out.
FORMS = {
    "OpenAI": ({"messages": HELLO}, HELLO, {}),
    "a developer and capitals": (
        {"messages": [{"role": "Developer", "content": "Be brief."}, {"role": "USER", "content": "Hi"},
                      {"role": " Assistant", "content": "Ho"}]},
        talk("s: Be brief.", *["u: Hi", "a: Ho"]), {},
    ),
    "text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Is 1 "}, {"type": "text", "text": "1?"}]},
                      {"role": "assistant", "content": [{"type": "output_text", "text": "One", "annotations": []}]}]},
        talk("u: Is 1 1?", "a: One"), {},
    ),
    "weights": (
        {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "weight": 0},
                      {"role": "user", "content": "3"}, {"role": "assistant", "content": "4", "weight": 1}]},
        talk("u: 1", "a0: 2", "u: 3", "a1: 4"), {},
    ),
    "weights of Axolotl": (
        {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2", "train": False},
                           {"from": "human", "value": "3"}, {"from": "gpt", "value": "4", "train": True}]},
        talk("u: 1", "a0: 2", "u: 3", "a1: 4"), {},
    ),
    "Anthropic": (
        {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}], "messages": HELLO},
        [*talk("s: Be brief."), *HELLO], {"cache_control of a text part": 1},
    ),
    "the same system twice": (
        {"system": "Be brief.", "messages": talk("s: Be brief.", "u: Hi", "a: Ho")},
        talk("s: Be brief.", "u: Hi", "a: Ho"), {},
    ),
    "ShareGPT (Vicuna)": (
        {"id": "QWJhYvA_0", "conversations": [{"from": "human", "value": "Hi", "markdown": None},
                                              {"from": "gpt", "value": "Ho", "markdown": None}]},
        HELLO, {"id": 1},
    ),
    "OpenHermes": (
        {"system_prompt": None, "model": None, "source": "airoboros", "title": "", "conversations": [
            {"from": "system", "value": "Sei kurz.", "weight": None}, {"from": "human", "value": "Hi", "weight": 0.0},
            {"from": "gpt", "value": "Ho", "weight": 1.0}]},
        talk("s: Sei kurz.", "u0: Hi", "a1: Ho"), {"source": 1},
    ),
    "LLaMA-Factory's ShareGPT": (
        {"conversations": share(("human", "你好"), ("gpt", "您好")), "system": "你是助手。", "tools": "[]"},
        talk("s: 你是助手。", "u: 你好", "a: 您好"), {"tools": 1},
    ),
    "conversations with role and content": ({"conversations": HELLO}, HELLO, {}),
    "WildChat": (
        {"conversation": [message | {"language": "English", "toxic": False} for message in HELLO], "turn": 1},
        HELLO, {"language of a message": 1, "toxic of a message": 1, "turn": 1},
    ),
    "Alpaca": ({"instruction": "Add.", "input": "1 + 1", "output": "2"}, talk("u: Add.\n\n1 + 1", "a: 2"), {}),
    "Alpaca without input": ({"instruction": "Hi", "input": "", "output": "Ho"}, HELLO, {}),
    "LLaMA-Factory's Alpaca": (
        {"instruction": "继续", "input": "", "output": "第三句", "system": "你写诗。",
         "history": [["写诗", "第一句"], ["继续", "第二句"]]},
        talk("s: 你写诗。", "u: 写诗", "a: 第一句", "u: 继续", "a: 第二句", "u: 继续", "a: 第三句"), {},
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "closed_qa"},
        talk("u: Who?\n\nAda wrote it.", "a: Ada."), {"category": 1},
    ),
    "UltraChat": ({"id": "0", "data": ["1", "2", "3", "4"]}, talk("u: 1", "a: 2", "u: 3", "a: 4"), {"id": 1}),
    "UltraChat 200k": (
        {"prompt": "Hi", "prompt_id": "f0", "messages": [{"content": "Hi", "role": "user"},
                                                         {"content": "Ho", "role": "assistant"}]},
        HELLO, {"prompt": 1, "prompt_id": 1},
    ),
    "OpenOrca": (
        {"id": "flan.1", "system_prompt": "Think.", "question": "Hi", "response": "Ho"},
        talk("s: Think.", "u: Hi", "a: Ho"), {"id": 1},
    ),
    "prompt and completion": ({"prompt": "Hi", "completion": "Ho"}, HELLO, {}),
    "TRL's prompt and completion": (
        {"prompt": talk("u: 1", "a: 2", "u: 3"), "completion": talk("a: 4")}, talk("u: 1", "a0: 2", "u: 3", "a: 4"), {},
    ),
    "GSM8K": ({"question": "1 + 1?", "answer": "It is 2\n#### 2"}, talk("u: 1 + 1?", "a: It is 2\n#### 2"), {}),
    "MetaMath": ({"type": "GSM_Rephrased", "query": "Hi", "response": "Ho"}, HELLO, {"type": 1}),
    "Firefly": ({"kind": "对联", "input": "春风", "target": "秋雨"}, talk("u: 春风", "a: 秋雨"), {"kind": 1}),
    "Firefly's dialogues": ({"conversation": [{"human": "你好", "assistant": "您好"}]}, talk("u: 你好", "a: 您好"), {}),
    "reasoning": (
        {"messages": [*talk("u: 1 + 1?"), {"role": "assistant", "reasoning_content": "Easy.", "content": "2"}]},
        talk("u: 1 + 1?", "a: 2"), {"reasoning_content of a message": 1},
    ),
    "reasoning parts": (
        {"messages": [*talk("u: 1 + 1?"), {"role": "assistant", "content": [{"type": "thinking", "thinking": "Easy."},
                                                                            {"type": "text", "text": "2"}]}]},
        talk("u: 1 + 1?", "a: 2"), {"thinking of a message": 1},
    ),
    "no tool called": (
        {"messages": [*talk("u: Hi"), {"role": "assistant", "content": "Ho", "tool_calls": [], "function_call": None}]},
        HELLO, {},
    ),
    "only a list of messages": (HELLO, HELLO, {}),
}  # fmt: skip

CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
BAD = [
    ("{", "broken JSON", r"not valid JSON \(.*, column 2\)"),
    ("[" * 100_000, "broken JSON", "not valid JSON"),
    ("9" * 5000, "broken JSON", "not valid JSON"),
    ('{"prompt": "a", "prompt": "b", "response": "c"}', "broken JSON", 'not valid JSON ."prompt" occurs twice'),
    (b'{"instruction": "\xe4", "output": "b"}', "text that is not UTF-8", "UTF-8 text .column 18: byte 0xe4.*iconv"),
    (3, "no known form", "a conversation must be an object, not a number"),
    ({"text": "a"}, "no known form", 'no conversation is found in the fields text: .*"messages", "conversations"'),
    ({"instruction": "a", "input": "b"}, "no field with an answer", 'there is no "output" beside "instruction"'),
    ({"prompt": "a", "chosen": "b"}, "no field with an answer", 'no "completion" beside "prompt" .* prompt, chosen'),
    ({"instruction": "a", "output": 3}, "a wrong type", '"output" must be a string, not a number'),
    ({"instruction": "a", "output": ""}, "an empty answer", "message 2, the assistant's, is empty"),
    ({"instruction": "a", "output": None}, "an empty answer", "message 2, the assistant's, is empty"),
    ({"instruction": "a", "input": [3], "output": "b"}, "a wrong type", '"input" must be a string, not a list'),
    ({"instruction": "a", "output": "b", "history": "c"}, "a wrong type", '"history" must be a list of .* pairs'),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "a wrong type", 'item 1 of "history" must be a pair'),
    ({"instruction": "a", "output": "b", "system": 3}, "a wrong type", '"system" must be a string'),
    ({"messages": "a"}, "a wrong type", '"messages" must be a list of messages, not a string'),
    ({"messages": []}, "no messages", "a list of at least one message"),
    ({"messages": [3]}, "a wrong type", "message 1 must be an object"),
    ({"messages": [{"role": "user"}]}, "a message without role or content", "message 1 .* has only the fields role"),
    ({"messages": [{"role": 3, "content": "a"}]}, "a wrong type", 'message 1: "role" must be a string, not a number'),
    ({"messages": [{"role": "user", "content": 3}]}, "a wrong type", '"content" must be a string or a list of text'),
    ({"messages": [{"role": "user", "content": None}]}, "a wrong type", "text parts, not null"),
    ({"conversations": share(("narrator", "a"))}, "an unknown role", "message 1: \"from\" is 'narrator'; the known"),
    ({"conversations": share(("gpt", "a"), ("human", "b"))}, "an opening assistant turn", "instead of user"),
    ({"conversations": share(("human", "a"), ("human", "b"))}, "repeated roles", "message 2 has the role user"),
    ({"messages": talk("u: a", "a: b", "u: c")}, "a closing user turn", "the last message must be"),
    ({"system": "a", "messages": talk("s: b", "u: c", "a: d")}, "two system messages", "two different system messages"),
    ({"messages": [*talk("u: a"), CALL]}, "tool calls", "message 2: tool calls"),
    ({"messages": [*talk("u: a"), {"role": "tool", "content": "5"}]}, "tool calls", "'tool': tool calls"),
    ({"conversations": share(("human", "a"), ("function_call", "{}"))}, "tool calls", "tool calls and"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool calls", "tool calls and"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "content that is not text",
     "message 1: \"content\" has a part of type 'image_url': only text"),
    ({"messages": [{"role": "user", "content": [3]}]}, "content that is not text", "has a part of a number"),
    ({"image": "a.png", "conversations": share(("human", "a"), ("gpt", "b"))}, "content that is not text", '"image"'),
    ({"messages": [*talk("u: a"), {"role": "assistant", "content": "b", "weight": 0.5}]}, "a weight other than 0 and 1",
     'message 2: "weight" must be 0 or 1, not 0.5'),
    ({"messages": talk("u: a", "a0: b")}, "weight 0 on every answer", "nothing to learn from"),
    ({"messages": talk("u: \ud800", "a: b")}, "text with half a surrogate pair", "message 1 holds"),
]  # fmt: skip


def as_line(bad):
    text = bad if isinstance(bad, str | bytes) else json.dumps(bad)
    return text if isinstance(text, bytes) else text.encode()
