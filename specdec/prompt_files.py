"""One prompt, and files of them in each form there is, with one clear error for everything that can be wrong.

`jsonl`, ours: `question_id`, `category`, `turns`; or `prompt` alone. Continued as it stands, unless `"chat": true`
beside it asks for the model's chat template.

`spec-bench` (github.com/hemingkx/Spec-Bench, `data/spec_bench/question.jsonl`): the same keys. Domain: the six tasks
Spec-Bench reports, its eight MT-bench categories taken together.

`speed-bench` (hub data set nvidia/SPEED-Bench, arXiv 2604.09557): one configuration (`qualitative`, `throughput_1k`,
...) as Parquet or JSONL. About half of the published rows hold a placeholder instead of their text (sources whose
licences forbid a copy) and must be filled in with NVIDIA's own preparation script first. A run over placeholders would
measure how well one sentence is predicted: they are refused.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.shown_errors import ExperimentError

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Categories that Spec-Bench reports together as "mt_bench"."""
TASKS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"


class WorkloadError(ExperimentError):
    """A file of prompts cannot be used; the message names file, line and what was expected."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    id: unique within its source. domain: results are grouped by it.
    turns: what the user says, turn by turn; the model's own answers go in between.
    chat: wrap turns in the tokenizer's chat template if it has one; False: the text is continued as it stands.
    ids: token ids to use instead of encoding `turns` (one turn only), None otherwise.
    """

    id: str
    domain: str
    turns: tuple[str, ...]
    chat: bool = False
    ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.turns or not all(isinstance(turn, str) and turn for turn in self.turns):
            raise WorkloadError(f"prompt {self.id!r}: expected at least one turn, none of them empty")


def read(path: Path, form: str, chat: bool = False) -> list[Prompt]:
    """All prompts of a file in a form. chat: of `jsonl` lines that do not say it themselves.

    Raises:
        WorkloadError: a file or line of another form, placeholder rows, an id that occurs twice, no prompts.
    """
    name = f"{form}: {path.name}"
    if not path.is_file():
        raise WorkloadError(
            f"{form}: expected a file of prompts, found none at {path.name!r}; give the path of the file"
        )
    rows = list(_parquet(path, name) if path.suffix == ".parquet" else _json_lines(path, name))
    found: dict[str, Prompt] = {}
    masked = 0
    for where, entry in rows:
        prompt = _prompt(entry, where, form, chat)
        if prompt.id in found:
            raise WorkloadError(f"{name}: the id {prompt.id!r} occurs twice; results are filed under it")
        found[prompt.id] = prompt
        masked += form == "speed-bench" and any(PLACEHOLDER in turn for turn in prompt.turns)
    if masked:
        raise WorkloadError(
            f"{form}: {masked} of {len(rows)} rows of {path.name} are placeholders: fill them in with the preparation "
            "script that NVIDIA publishes beside the data set, or drop them and say so"
        )
    if not found:
        raise WorkloadError(f"{name}: no prompts in it")
    return list(found.values())


def read_prompts(path: Path, chat: bool = False) -> list[Prompt]:
    """A user's own prompts: a text file is one; `.jsonl` has one a line, `{"prompt": TEXT}` or the `jsonl` form.

    chat: see Prompt; of lines that do not say `"chat"` themselves.

    Raises:
        WorkloadError: no such file, not such a file, or nothing in it.
    """
    if path.suffix == ".jsonl":
        return read(path, "jsonl", chat)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise WorkloadError(f"prompts: could not read {path.name!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise WorkloadError(f"prompts: expected a text file in UTF-8, got {path.name!r}") from None
    return [Prompt(path.name, path.stem, (text,), chat=chat)]


def prompt_ids(tokenizer: Any, prompt: Prompt, answers: Sequence[str] = ()) -> list[int]:
    """The ids that turn `len(answers)` of a prompt starts from, the earlier turns and their answers before it."""
    if prompt.ids is not None and not answers:
        return list(prompt.ids)
    if prompt.chat and has_template(tokenizer):
        messages = []
        for asked, said in zip(prompt.turns, [*answers, None], strict=False):
            messages.append({"role": "user", "content": asked})
            if said is not None:
                messages.append({"role": "assistant", "content": said})
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    pieces = [text for pair in zip(prompt.turns, [*answers, ""], strict=False) for text in pair]
    return list(tokenizer("\n\n".join(piece for piece in pieces if piece)).input_ids)


def has_template(tokenizer: Any) -> bool:
    """Whether a model was trained on conversations."""
    return bool(getattr(tokenizer, "chat_template", None))


def how_asked(tokenizer: Any, chat: bool) -> str:
    """One line on what own prompts became, for whoever gave them."""
    if not has_template(tokenizer):
        return "own prompts: continued as they stand (this model has no chat template)"
    if chat:
        return "own prompts: asked in the model's chat template (--no-chat continues them as they stand)"
    return "own prompts: continued as they stand (--chat asks them in the model's chat template)"


def _prompt(entry: Any, where: str, form: str, chat: bool) -> Prompt:
    if not isinstance(entry, dict):
        raise WorkloadError(f"{where}: expected an object, got {type(entry).__name__}")
    chat = entry.get("chat", chat) if form == "jsonl" else True
    if not isinstance(chat, bool):
        raise WorkloadError(f"{where}: expected 'chat', true or false, got {chat!r}")
    if form == "jsonl" and isinstance(entry.get("prompt"), str) and entry["prompt"]:
        return Prompt(where, "own", (entry["prompt"],), chat)
    known, turns, domain = entry.get("question_id"), entry.get("turns"), entry.get("category")
    if isinstance(known, bool) or not isinstance(known, (int, str)) or known == "":
        raise WorkloadError(f"{where}: expected 'question_id', a number or a name, got {known!r}")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise WorkloadError(f"{where}: expected 'turns', a list of non-empty strings, got {str(turns)[:60]!r}")
    if not isinstance(domain, str) or not domain:
        raise WorkloadError(f"{where}: expected 'category', a name, got {domain!r}")
    if form == "spec-bench":
        domain = "mt_bench" if domain in MT_BENCH else domain
        if domain not in TASKS:
            raise WorkloadError(f"{where}: expected a category of {', '.join((*MT_BENCH, *TASKS[1:]))}, got {domain!r}")
    return Prompt(str(known), domain, tuple(turns), chat)


def _json_lines(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                yield f"{name} line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise WorkloadError(f"{name} line {number} is not JSON ({error})") from None


def _parquet(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = importlib.import_module("pyarrow.parquet").read_table(path).to_pylist()
    except ImportError:
        raise WorkloadError(
            f"{name} is Parquet, which needs pyarrow: pip install 'specdec-lm[parquet]', or convert it to JSONL"
        ) from None
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from both
        raise WorkloadError(f"{name} is not a Parquet file ({error})") from None
    yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, 1))
