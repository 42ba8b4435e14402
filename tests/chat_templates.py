"""Chat templates with the features of real families, written for the tests, and a BPE tokenizer for each."""

from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML_TOOLS = r"""
{%- set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{%- if tools %}
{{- '<|im_start|>system\n' + first + intro }}
{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}
{{- outro + '<|im_end|>\n' }}
{%- elif first %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
"""

QWEN3 = (
    r"""
{%- set intro = '# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>' %}
{%- set outro = '\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' %}
"""
    + CHATML_TOOLS
    + r"""
{%- set last = namespace(user=0) %}
{%- for m in messages %}{%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content or '' %}{%- set thought = m.reasoning_content or '' %}
{%- if not thought and '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > last.user and (loop.last or thought) %}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}{%- else %}{{- content }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{%- if content or not loop.first %}{{- '\n' }}{%- endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}
"""
)

QWEN25 = QWEN3.replace("{%- if loop.index0 > last.user and (loop.last or thought) %}", "{%- if false %}").replace(
    "{%- if not thought and '</think>' in content %}", "{%- if false %}"
)
"""Without reasoning: it never rewrites what was said."""

CODER = (
    r"""
{%- set intro = '# Tools\n\nThese functions may be called:\n<tools>' %}
{%- set outro = '\n</tools>\nCall one with <tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call>' %}
"""
    + CHATML_TOOLS
    + r"""
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{%- if m.content or not loop.first %}{{- '\n' }}{%- endif %}
{{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\n' + (value if value is string else value | tojson) + '\n</parameter>\n' }}
{%- endfor %}
{{- '</function>\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
)

MINIMAX = (
    CODER.replace(
        "'<tool_call>\\n<function=' + call.function.name + '>\\n'", """'<invoke name="' + call.function.name + '">\\n'"""
    )
    .replace("'<parameter=' + key + '>\\n'", """'<parameter name="' + key + '">'""")
    .replace("'\\n</parameter>\\n'", "'</parameter>\\n'")
    .replace(
        "{{- '</function>\\n</tool_call>' }}\n{%- endfor %}",
        "{{- '</invoke>' }}\n{%- if loop.last %}{{- '\\n</tool_call>' }}{%- endif %}\n{%- endfor %}",
    )
    .replace(
        "{%- if m.content or not loop.first %}{{- '\\n' }}{%- endif %}", "{{- '\\n<tool_call>\\n' if loop.first else '\\n' }}"
    )
)
"""All calls of a turn between one pair of markers."""

PHI4 = (
    QWEN25.replace('\'<tool_call>\\n{"name": "\'', "('<tool_call>[' if loop.first else ', ') + '{\"name\": \"'")
    .replace("'}\\n</tool_call>'", "('}]</tool_call>' if loop.last else '}')")
    .replace("{%- if content or not loop.first %}{{- '\\n' }}{%- endif %}", "")
)
"""A list of all calls between one pair of markers."""

LLAMA3 = r"""
{{- bos_token }}
{%- set date = date_string if date_string is defined else '26 Jul 2024' %}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{%- set messages = messages[1:] if messages[0].role == 'system' else messages %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + ('Environment: ipython\n' if tools else '') + 'Cutting Knowledge Date: December 2023\nToday Date: ' + date + '\n\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' }}
{%- elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
{%- elif tools and loop.first %}
{{- '<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a function call with its proper arguments that best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{%- endfor %}
{{- m.content | trim + '<|eot_id|>' }}
{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

GEMMA = r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}
"""

PHI = r"""
{%- for m in messages %}
{%- if m.role == 'system' and m.content %}{{- '<|system|>\n' + m.content + '<|end|>\n' }}
{%- elif m.role in ('user', 'assistant') %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}
"""

MISTRAL = r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}{%- endif %}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}
{{- m.content or '' }}
{%- if m.tool_calls %}
{{- '[TOOL_CALLS][' }}
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']') }}
{%- endfor %}
{%- endif %}
{{- eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}
{{- '[TOOL_RESULTS]{"content": ' + (m.content | tojson) + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}
"""

GLM = r"""[gMASK]<sop>
{%- if tools %}
{{- '<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n' }}
{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
{{- '</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>' }}
{%- endif %}
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|user|>\n' + m.content }}
{%- elif m.role == 'system' %}{{- '<|system|>\n' + m.content }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content or '' %}{%- set thought = m.reasoning_content or '' %}
{%- if not thought and '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|assistant|>\n<think>' + (thought.strip() if loop.index0 > last.user else '') + '</think>' }}
{%- if content.strip() %}{{- '\n' + content.strip() }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>' + call.function.name + '\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<arg_key>' + key + '</arg_key>\n<arg_value>' + (value if value is string else value | tojson) + '</arg_value>\n' }}
{%- endfor %}
{{- '</tool_call>' }}
{%- endfor %}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

DEEPSEEK = r"""
{{- bos_token + (messages[0].content if messages[0].role == 'system' else '') }}
{%- if tools %}{{- '\n\n## Tools\n' + (tools | tojson) }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}
{{- ('<｜Assistant｜>' if messages[loop.index0 - 1].role == 'user' else '') + (m.content or '').split('</think>')[-1] }}
{%- if m.tool_calls %}
{{- '<｜tool▁calls▁begin｜>' }}
{%- for call in m.tool_calls %}
{{- ('' if loop.first else '\n') + '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- '<｜tool▁calls▁end｜>' }}
{%- endif %}
{{- eos_token }}
{%- elif m.role == 'tool' %}
{{- ('' if messages[loop.index0 - 1].role == 'tool' else '<｜tool▁outputs▁begin｜>') + '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<｜tool▁outputs▁end｜>' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role == 'user' %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}
"""

MISTRAL11 = MISTRAL.replace("{{- '[TOOL_CALLS][' }}", "").replace(
    """{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']') }}""",
    """{{- '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id + '[ARGS]' + (call.function.arguments | tojson) }}""",
)
"""Names outside of the JSON, as Mistral writes them from version 11 on."""

TEXT = r"""
{%- for m in messages %}{{- m.role + ': ' + m.content + '\n\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}
"""
"""Turns end with text."""

HARMONY = r"""
{%- for m in messages %}
{%- if m.role == 'assistant' and m.reasoning_content and loop.last %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}{%- endif %}
{{- '<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') + '<|message|>' + m.content + ('<|return|>' if m.role == 'assistant' and loop.last else '<|end|>') }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""
"""Reasoning and answer as two messages, as in gpt-oss."""

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_ADDED = (*CHATML, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


@dataclass(frozen=True)
class Family:
    """A template and the special tokens of its tokenizer."""

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    tools: bool = True
    several: bool = True
    """Whether a message may have several calls."""
    system: bool = True
    sentencepiece: bool = False
    """Whether the tokenizer is of the kind of SentencePiece (spaces as ▁, one put before a text), not byte-level."""


_LLAMA = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
_GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>", "<think>", "</think>")
_GLM = (
    *_GLM,
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<tool_response>",
    "</tool_response>",
)
_MISTRAL = (
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
_MISTRAL = (*_MISTRAL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]")
_DEEPSEEK = tuple(f"<｜{name}｜>" for name in ("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant", "tool▁calls▁begin"))
_DEEPSEEK += tuple(
    f"<｜tool▁{name}｜>" for name in ("calls▁end", "call▁begin", "call▁end", "sep", "outputs▁begin", "outputs▁end")
)
_DEEPSEEK += ("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<think>", "</think>")

FAMILIES = {
    "qwen3": Family(QWEN3, QWEN_ADDED, "<|im_end|>"),
    "qwen2.5": Family(QWEN25, QWEN_ADDED, "<|im_end|>"),
    "hermes": Family(QWEN25, CHATML, "<|im_end|>"),  # its markers of calls are ordinary text
    "coder": Family(CODER, QWEN_ADDED, "<|im_end|>"),
    "minimax": Family(MINIMAX, QWEN_ADDED, "<|im_end|>"),
    "phi4": Family(PHI4, QWEN_ADDED, "<|im_end|>"),
    "base": Family(QWEN25, QWEN_ADDED, "<|endoftext|>"),  # turns do not end with the end-of-sequence token
    "llama3": Family(LLAMA3, _LLAMA, "<|eot_id|>", "<|begin_of_text|>", several=False),
    "gemma": Family(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>", tools=False, system=False),
    "phi": Family(PHI, ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", tools=False),
    "mistral": Family(MISTRAL, _MISTRAL, "</s>", "<s>"),
    "mistral-sentencepiece": Family(MISTRAL, _MISTRAL, "</s>", "<s>", sentencepiece=True),
    "mistral11": Family(MISTRAL11, _MISTRAL, "</s>", "<s>"),
    "glm": Family(GLM, _GLM, "<|endoftext|>"),
    "deepseek": Family(DEEPSEEK, _DEEPSEEK, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
}

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen split a text before they merge bytes."""
TRAINED_ON = [
    "The quick brown fox jumps over the lazy dog.\n\nWhat is 12 + 30? It is 42.\n",
    '{"name": "search", "arguments": {"query": "weather in Paris", "limit": 10}}\n',
    "<parameter=query>\nvalue\n</parameter>\n  indented   text\t\n\n\n",
    "naïve café — 東京 🙂 Привет",
]


@cache
def tokenizer(name: str, vocabulary: int = 600) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with merges over words, punctuation and runs of whitespace, and the family's special tokens."""
    family = FAMILIES[name]
    inner = Tokenizer(models.BPE())
    if family.sentencepiece:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted({*map(chr, range(32, 127)), *"".join(TRAINED_ON), *"\n\t\u00a0\U000f0000\U0010fffd"})
    else:
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    inner.train_from_iterator(TRAINED_ON * 3, trainer)
    rstrip = name == "phi"  # as Phi 3's tokenizer, whose tokens swallow the whitespace after them
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=rstrip) for token in family.special])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=family.eos, bos_token=family.bos, clean_up_tokenization_spaces=False
    )
    made.chat_template = family.template.strip("\n")
    return made
