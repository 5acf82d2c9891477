"""A model folder that can chat: the demo's, with a chat template of its own."""

from __future__ import annotations

import json
from pathlib import Path

from api_server import MODEL

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if tools %}tools={{ tools | tojson }}\n{% endif %}"
    "{% if shout %}LOUD{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chatting_model(folder: Path, template: str = TEMPLATE) -> Path:
    """The demo's model under `folder`, with `template`."""
    model = folder / "chatty"
    model.mkdir()
    for path in MODEL.iterdir():
        if path.name != "tokenizer_config.json":
            (model / path.name).symlink_to(path)
    config = json.loads((MODEL / "tokenizer_config.json").read_bytes())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return model
