"""Chat templates in the manner of well-known models, written for the tests: what differs between them, and no more."""

# Roles in plain turns; knows neither tools nor reasoning. As SmolLM2's, with a system message of its own.
SMOLLM2 = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system message in the last user turn of what it is given, as Mistral's version 3.
MISTRAL = (
    "<s>{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}[INST]{{ system + '\n\n' + m['content'] }}[/INST]"
    "{% else %}[INST] {{ m['content'] }}[/INST]{% endif %}"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
# Arguments of tool calls are encoded as JSON, whatever they are. As Qwen 2.5's.
QWEN_2_5 = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}</tools><|im_end|>\n"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{{ m['content'] }}\n</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{% set f = c['function'] or c %}<tool_call>\n"
    '{"name": "{{ f[\'name\'] }}", "arguments": {{ f[\'arguments\'] | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Text stays text; reasoning only after the last question. As Qwen 3's.
QWEN_3 = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}</tools><|im_end|>\n"
    "{% endif %}{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['reasoning_content'] and loop.index0 > ns.last %}<think>\n{{ m['reasoning_content'] }}\n"
    "</think>\n\n{% endif %}"
    "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{% set f = c['function'] or c %}<tool_call>\n"
    "{\"name\": \"{{ f['name'] }}\", \"arguments\": {% if f['arguments'] is string %}{{ f['arguments'] }}{% else %}"
    "{{ f['arguments'] | tojson }}{% endif %}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Arguments are text that is put between other text. As DeepSeek V3's.
DEEPSEEK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}{% elif m['role'] == 'assistant' %}"
    "<|Assistant|>{% for c in m['tool_calls'] or [] %}{{ '<call>' + c['function']['name'] + '\n' + "
    "c['function']['arguments'] + '</call>' }}{% endfor %}{{ m['content'] }}<|end|>{% else %}"
    "{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
# Header and end of every turn, content trimmed, the date of today nowhere. As Llama 3's.
LLAMA_3 = (
    "<s>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# No system turn: it is put before the first user's. The assistant is called model. As Gemma's.
GEMMA = (
    "<s>{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if loop.first %}{{ first }}{% endif %}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Forgets the system message altogether.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}</>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALL = {
    "SmolLM2": SMOLLM2,
    "Mistral": MISTRAL,
    "Qwen 2.5": QWEN_2_5,
    "Qwen 3": QWEN_3,
    "DeepSeek": DEEPSEEK,
    "Llama 3": LLAMA_3,
    "Gemma": GEMMA,
}
