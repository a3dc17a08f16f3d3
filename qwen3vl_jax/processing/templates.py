"""The chat template of a checkpoint: found, and rendered by transformers' sandboxed renderer.

The released template is known by its hash and rendered here (0.5 s once, for the import). Any other
is untrusted code: the sandbox keeps it from files and objects, and a child process with limits on
memory and CPU time keeps it from filling the machine (about 0.7 s for each prompt).
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import MediaError, PromptError
from qwen3vl_jax.processing.media_config import MAX_JSON_BYTES
from qwen3vl_jax.processing.sources import read_file, read_json_object
from qwen3vl_jax.processing.tokenizer import load_tokenizer_config

MAX_TEMPLATE_BYTES = 256 << 10
MAX_RENDERED_CHARACTERS = 16 << 20
CHILD_MEMORY_BYTES = 512 << 20
CHILD_CPU_S = 2
CHILD_WALL_S = 60
# SHA-256, without the newline at the end, of the template of all released Qwen3-VL Instruct models.
KNOWN = frozenset({"9d879ef91075acbfb2df7e441fd79d60bacfca989cf6d511d2af45c681e94f10"})
ADDRESS = re.compile(r"0x[0-9a-fA-F]{4,}")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The Jinja source of a template, and the file that it came from."""

    source: str
    origin: str

    @property
    def known(self) -> bool:
        """Whether this is the released template, which is known to be harmless."""
        return hashlib.sha256(self.source.rstrip("\n").encode()).hexdigest() in KNOWN


def load_template(directory: Path) -> ChatTemplate:
    """The template in chat_template.jinja, chat_template.json or tokenizer_config.json.

    Raises:
        PromptError: there is none, or it is over 256 KiB.
    """
    origin, source = find_template(directory)
    if not isinstance(source, str) or not source.strip():
        raise PromptError(f"{origin}: chat_template is not a text")
    size_bytes = len(source.encode(errors="surrogatepass"))
    if size_bytes > MAX_TEMPLATE_BYTES:
        raise PromptError(
            f"{origin}: a chat template of {size_bytes:,} bytes; {MAX_TEMPLATE_BYTES:,} are allowed"
        )
    return ChatTemplate(source, origin)


def find_template(directory: Path) -> tuple[str, object]:
    """The first place that has a template, and what is there."""
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.name, read_file(path, max_bytes=MAX_TEMPLATE_BYTES).decode()
        except (MediaError, UnicodeDecodeError) as error:
            raise PromptError(f"{path.name}: not a chat template: {error}") from error
    path = directory / "chat_template.json"
    if path.exists():
        values = read_json_object(path, max_bytes=MAX_JSON_BYTES, error=PromptError)
        return path.name, values.get("chat_template")
    value = load_tokenizer_config(directory).get("chat_template")
    if isinstance(value, list):
        named = [item for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = named[0].get("template") if named else None
    if value is None:
        raise PromptError(
            f"{directory}: no chat_template.jinja, chat_template.json or tokenizer_config.json "
            "with a chat template"
        )
    return "tokenizer_config.json", value


def render(template: ChatTemplate, messages: list[dict[str, Any]], **settings: Any) -> str:
    """The text of one conversation.

    Args:
        template: its Jinja source may be hostile.
        messages: plain JSON values.
        settings: `add_generation_prompt`, `continue_final_message` and the template's own.

    Raises:
        PromptError: the template fails, or takes too much memory or time, or writes too much.
    """
    arguments = {"conversations": [messages], "chat_template": template.source, **settings}
    answer = render_here(arguments) if template.known else render_in_child(arguments)
    label = f"chat template of {template.origin}"
    if "error" in answer:
        detail = ADDRESS.sub("0x...", " ".join(answer["message"].split()))
        raise PromptError(f"{label}: {answer['error']}: {detail}")
    if "memory" in answer:
        raise PromptError(f"{label}: needs more than {CHILD_MEMORY_BYTES:,} bytes of memory")
    if "time" in answer:
        raise PromptError(f"{label}: needs more than {CHILD_CPU_S} s to render")
    if "text" not in answer or len(answer["text"]) > MAX_RENDERED_CHARACTERS:
        raise PromptError(f"{label}: writes more than {MAX_RENDERED_CHARACTERS:,} characters")
    return str(answer["text"])


def render_here(arguments: dict[str, Any]) -> dict[str, Any]:
    """Render in this process."""
    # Without torch, importing transformers prints advice that is of no use here.
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    finally:
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before
    try:
        return {"text": render_jinja_template(**arguments)[0][0]}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)[:300]}


def render_in_child(arguments: dict[str, Any]) -> dict[str, Any]:
    """Render in a process with limits on memory and CPU time."""
    request = {
        "arguments": arguments,
        "memory_bytes": CHILD_MEMORY_BYTES,
        "cpu_s": CHILD_CPU_S,
        "max_characters": MAX_RENDERED_CHARACTERS,
    }
    script = Path(__file__).with_name("template_child.py")
    try:
        child = subprocess.run(
            [sys.executable, "-P", str(script)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=CHILD_WALL_S,
            check=False,
            env={**os.environ, "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
        )
    except subprocess.TimeoutExpired:
        return {"time": True}
    if child.returncode < 0:
        return {"time": True}
    try:
        return dict(json.loads(child.stdout))
    except ValueError:
        return {"memory": True}
