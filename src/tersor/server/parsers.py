"""Who reads an answer: which parsers a model needs, and one chain of them for each answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tersor.errors import InputError, did_you_mean
from tersor.server.events import Parser, Plain
from tersor.server.harmony import CHANNEL, HarmonyParser
from tersor.server.reasoning import CLOSE, ThinkParser
from tersor.server.stops import StopParser, TextStop
from tersor.server.tools import FORMS, LISTED, Form, ToolParser

TOOL_PARSERS = ("auto", *FORMS, "none")
REASONING_PARSERS = ("auto", "think", "gpt-oss", "none")


@dataclass(frozen=True, slots=True)
class Parsers:
    """The parsers of a model; "none" where it writes no reasoning or no calls, "gpt-oss" for both."""

    tools: str
    reasoning: str

    @classmethod
    def of(cls, tools: str, reasoning: str, template: str | None) -> Parsers:
        """Return the parsers by their names; `auto` asks the chat template.

        Raises:
            InputError: no such parser.
        """
        for kind, name, names in (("tool", tools, TOOL_PARSERS), ("reasoning", reasoning, REASONING_PARSERS)):
            if name not in names:
                raise InputError(f"{kind} parser {name!r}{did_you_mean(name, names)}: use {', '.join(names)}")
        text = template or ""
        if reasoning == "auto":
            reasoning = "gpt-oss" if CHANNEL in text else "think" if CLOSE in text else "none"
        if tools == "auto":
            tools = _tools_of(text)
        return cls("gpt-oss" if reasoning == "gpt-oss" else tools, reasoning)

    @property
    def special(self) -> bool:
        """Whether calls or reasoning are marked by special tokens, which the text must show."""
        return self.reasoning == "gpt-oss" or (self.tools in FORMS and FORMS[self.tools].special)

    def chain(
        self, prompt: str, names: Sequence[str], forced: str | None, stops: Sequence[str], include_stop: bool
    ) -> tuple[Parser, StopParser | None]:
        """Return what reads one answer, and what watches for stop texts in it where the engine does not.

        Args:
            prompt: text that the answer continues.
            names: functions that it may call; none where calls are not read.
            forced: `None`, the one function that a grammar makes it call, or "" where it makes it call any of them.
            stops, include_stop: stop texts, and whether they are part of the text; only looked at where reasoning is
                parsed, since there the engine does not know where reasoning ends.
        """
        if forced is not None:
            return ToolParser(Form(at_start=True, named=forced) if forced else LISTED, names), None
        calls: Parser = ToolParser(FORMS[self.tools], names) if names and self.tools in FORMS else Plain()
        if self.reasoning == "none":
            return calls, None
        watch = StopParser(calls, stops, include_stop) if stops else None
        if self.reasoning == "think":
            return ThinkParser(watch or calls, prompt), watch
        harmony = HarmonyParser(names)
        return (TextStop(harmony, watch) if watch else harmony), watch


def _tools_of(template: str) -> str:
    """The form of calls that a chat template writes itself."""
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or ('"parameters"' in template and "<|start_header_id|>" in template):
        return "llama3"
    return "none"
