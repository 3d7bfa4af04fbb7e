"""Chat templates in Jinja of the formats that the known families were trained on, written for these tests.

The formats are those of the models' cards: ChatML (Qwen, SmolLM), Llama 2, Llama 3, Mistral, Gemma, Phi.
"""

from __future__ import annotations

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (  # speaks of itself where it is told nothing
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help {{ '{{' }}people}}.<|im_end|>\n"
    "{% endif %}" + CHATML
)
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}[INST] {% if loop.first and system %}<<SYS>>\n"
    "{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s><s>{% endif %}{% endfor %}"
)
MISTRAL = (  # the system text goes into the last question
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system }}"
    "\n\n{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
GEMMA = (  # knows no system text; the answering role has another name
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA3 = (  # folds it into the first question
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ system if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
KNOWN = {
    "chatml": CHATML,
    "qwen": QWEN,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "phi4": PHI4,
}
COUNTING = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}> "  # no pieces make this
STOPS = {  # of markers that are tokens of the tests' vocabulary, or look like nothing else
    "chatml": {"<|im_start|>", "<|im_end|>"},
    "qwen": {"<|im_start|>", "<|im_end|>"},
    "llama2": {"[INST]", "[/INST]", "</s>", "<s>"},
    "llama3": {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
    "mistral": {"[INST]", "[/INST]", "</s>"},
    "gemma": set(),
    "gemma3": set(),
    "phi3": {"<|user|>", "<|end|>", "<|assistant|>"},
    "phi4": {"<|im_start|>", "<|im_sep|>", "<|im_end|>"},
}
