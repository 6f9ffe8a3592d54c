"""Calls of functions and reasoning: kept apart from text, however the text is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.fake_engine import FakeEngine
from helpers.served import HERMES, TEMPLATE, THINKS, Served, serving, tokenizer

from tersor.errors import InputError
from tersor.server.events import Arguments, CallBegins, CallFailed, Event, Parser, Plain, Reasoning, Text
from tersor.server.harmony import HarmonyParser
from tersor.server.markers import split_at
from tersor.server.parsers import Parsers
from tersor.server.reasoning import ThinkParser
from tersor.server.tools import FORMS, LISTED, Form, ToolParser

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Weather?"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("f", "g")
]
CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Z\u00fcrich", "days": [1, {"a": "}"}]}}\n</tool_call>'


def folded(parser: Parser, text: str, size: int) -> tuple[str, str, list[list[str]]]:
    """Push a text in pieces of a size and return (reasoning, text, calls)."""
    events: list[Event] = []
    for start in range(0, len(text), size):
        events += parser.push(text[start : start + size])
    reasoning = shown = ""
    calls: dict[int, list[str]] = {}
    for event in [*events, *parser.end()]:
        if isinstance(event, Text):
            shown += event.text
        elif isinstance(event, Reasoning):
            reasoning += event.text
        elif isinstance(event, CallBegins):
            assert event.index not in calls
            calls[event.index] = [event.name, ""]
        elif isinstance(event, Arguments):
            calls[event.index][1] += event.text
        else:
            assert isinstance(event, CallFailed) and event.raw.endswith(event.rest)
            del calls[event.index]
            shown += event.raw
    return reasoning, shown, [calls[index] for index in sorted(calls)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "shown", "calls"),
    [
        (
            "hermes",
            "Let me see.\n" + CALL + '\n<tool_call>\n{"arguments": {"b": 1}, "name": "g"}\n</tool_call>\n',
            "Let me see.",
            [["f", '{"city": "Z\u00fcrich", "days": [1, {"a": "}"}]}'], ["g", '{"b": 1}']],
        ),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [["f", "{}"]]),
        ("hermes", CALL + " bye", " bye", [["f", '{"city": "Z\u00fcrich", "days": [1, {"a": "}"}]}']]),
        ("hermes", "a < b <tool_ <tool", None, []),
        ("hermes", "blanks \n ", None, []),
        ("hermes", '<tool_call>\n{"name": "h", "arguments": {}}\n</tool_call> bye', None, []),
        ("hermes", "<tool_call>\nno JSON</tool_call> bye ", None, []),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": oops}}</tool_call> bye ', None, []),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": [1}}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "f", "arguments": "x"}', None, []),
        ("hermes", '<tool_call>{"name": "f", "arguments": 7}', None, []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "never', None, []),
        ("llama3", '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', "", None),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [["f", '{"a": 1}']]),
        ("llama3", '{"answer": 1} is it', None, []),
        ("llama3", ' Hello {"name": "f"} ', None, []),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "", None),
        ("mistral", 'Yes.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{}', "Yes.", None),
        ("mistral", "[TOOL_CALLS]f or not", None, []),
        ("mistral", "[TOOL_CALLS]f", None, []),
        ("mistral", "a [TOOL_ b", None, []),
    ],
)
def test_calls_are_read_and_what_is_none_is_text(
    form: str, text: str, shown: str | None, calls: list[list[str]] | None, size: int
) -> None:
    """Rule 22."""
    wanted = [["f", '{"a": 1}'], ["g", "{}"]] if calls is None else calls
    found = folded(ToolParser(FORMS[form], ["f", "g"]), text, size)
    assert found == ("", text if shown is None else shown, wanted)


def test_arguments_come_in_fragments_before_the_call_is_whole() -> None:
    """Rule 22."""
    parser = ToolParser(FORMS["hermes"], ["f"])
    assert parser.push('<tool_call>{"name": "f", "arg') == []
    assert parser.push('uments": {"ci') == [CallBegins(0, "f"), Arguments(0, '{"ci')]
    assert parser.push('ty": "a') == [Arguments(0, 'ty": "a')]
    assert parser.push('b"}}</tool') == [Arguments(0, 'b"}')]
    assert [*parser.push("_call>"), *parser.end()] == []


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_calls_that_a_grammar_writes_are_read(size: int) -> None:
    text = '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]'
    assert folded(ToolParser(LISTED, ["f", "g"]), text, size)[1:] == ("", [["f", '{"a": 1}'], ["g", "{}"]])
    named = Form(at_start=True, named="f")
    assert folded(ToolParser(named, ["f"]), ' {"name": 1}', size)[1:] == ("", [["f", '{"name": 1}']])


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "shown"),
    [
        ("", "<think>\nwhy </th> not\n</think>\n\nBecause.", "why </th> not", "Because."),
        ("", " \n<think>a</think>b", "a", "b"),
        ("[assistant]<think>\n", "a\n\nb</think> c", "a\n\nb", "c"),
        ("<think></think>", "c <think>d</think>", "", "c <think>d</think>"),
        ("", "<thinking> is text </think>", "", "<thinking> is text </think>"),
        ("", "  plain ", "", "  plain "),
        ("", "<think>never ends </thi", "never ends </thi", ""),
        ("", "<thi", "", "<thi"),
    ],
)
def test_reasoning_is_kept_apart_from_the_answer(prompt: str, text: str, reasoning: str, shown: str, size: int) -> None:
    """Rule 23."""
    assert folded(ThinkParser(Plain(), prompt), text, size)[:2] == (reasoning, shown)


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_the_channels_of_gpt_oss_are_reasoning_calls_and_text(size: int) -> None:
    """Rules 22 and 23."""
    text = "<|channel|>analysis<|message|>Hm <|x.<|end|><|start|>assistant<|channel|>"
    answer = "final<|message|>Sunny.<|return|>"
    assert folded(HarmonyParser(["f"]), text + answer, size) == ("Hm <|x.", "Sunny.", [])
    call = 'commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'
    assert folded(HarmonyParser(["f"]), text + call, size) == ("Hm <|x.", "", [["f", '{"a": 1}']])
    first = ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}'
    assert folded(HarmonyParser(["f"]), first, size) == ("", "", [["f", '{"a": 1}']])
    assert folded(HarmonyParser(["f"]), text + call + "x<|call|>", size)[1:] == ('{"a": 1}x', [])
    assert folded(HarmonyParser([]), "no channel <|", size) == ("", "no channel <|", [])
    assert folded(HarmonyParser([]), text + "fin", size) == ("Hm <|x.", "", [])


def test_markers_are_found_and_what_may_begin_one_is_held_back() -> None:
    assert split_at("ab<x>cd", ["<x>", "<y>"]) == ("ab", "<x>", "cd")
    assert split_at("ab<", ["<x>", "b<<<"]) == ("a", None, "b<")
    assert split_at("abc", ["bc", "bcd"]) == ("a", "bc", "")
    assert split_at("abc", []) == ("abc", None, "")


def test_a_chat_template_says_which_parsers_a_model_needs() -> None:
    for template, tools, reasoning in (
        (None, "none", "none"),
        (HERMES, "hermes", "none"),
        (THINKS, "hermes", "think"),
        ("[TOOL_CALLS]", "mistral", "none"),
        ("<|python_tag|>", "llama3", "none"),
        ("<|channel|>analysis", "gpt-oss", "gpt-oss"),
    ):
        assert Parsers.of("auto", "auto", template) == Parsers(tools, reasoning)
    assert Parsers.of("none", "none", THINKS) == Parsers("none", "none")
    with pytest.raises(InputError, match="tool parser 'hermse', did you mean 'hermes'"):
        Parsers.of("hermse", "auto", None)


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    with serving(FakeEngine(tokenizer(THINKS))) as served:
        yield served


@pytest.fixture
def server(running: Served) -> Iterator[Served]:
    """One server of a model that thinks and calls; each test leaves nothing in the engine."""
    running.engine.burst, running.engine.asked = 1, []
    yield running
    assert running.idle() and not running.engine._says


def deltas(events: list[Any]) -> list[Any]:
    """What each chunk adds."""
    return [event["choices"][0]["delta"] for event in events]


@pytest.mark.parametrize("burst", [1, 4])
def test_a_stop_text_means_nothing_inside_the_reasoning(server: Served, burst: int) -> None:
    """Rule 5: and behind it everything agrees, as rule 4 wants it."""
    server.engine.burst = burst
    said = "<think>one END two</think>three END four"
    body = {"messages": USER, "max_tokens": 60, "stop": "END", "logprobs": True}
    server.engine.say(said, said, said)
    choice = (answer := server.post(CHAT, body).json())["choices"][0]
    assert choice["message"]["reasoning_content"] == "one END two"
    assert (choice["message"]["content"], choice["finish_reason"]) == ("three ", "stop")
    entries = choice["logprobs"]["content"]
    text = "".join(entry["token"] for entry in entries)
    assert text.endswith("three END") and answer["usage"]["completion_tokens"] == len(entries)
    *events, last = server.events(CHAT, {**body, "stream_options": {"include_usage": True}})
    assert "".join(delta.get("content") or "" for delta in deltas(events)) == "three "
    assert last["usage"]["completion_tokens"] == len(entries)
    kept = server.post(CHAT, {**body, "include_stop_str_in_output": True}).json()["choices"][0]
    assert kept["message"]["content"] == "three END"


def test_reasoning_streams_in_a_field_of_its_own(server: Served) -> None:
    """Rule 23: the field is `reasoning_content`."""
    server.engine.say("<think>\nWhy so.\n</think>\n\nBecause.", "Nothing to think.")
    found = deltas(server.events(CHAT, {"messages": USER}))
    assert "".join(delta.get("reasoning_content", "") for delta in found) == "Why so."
    assert "".join(delta.get("content", "") for delta in found) == "Because."
    message = server.chat().choices[0].message
    assert message.content == "Nothing to think." and "reasoning_content" not in message.model_dump()


def test_calls_stream_with_one_index_and_arguments_in_fragments(server: Served) -> None:
    """Rule 22."""
    second = CALL.replace('"f"', '"g"')
    server.engine.say(f"Wait.\n{CALL}\n{second}", f"Wait.\n{CALL}\n{second}")
    events = server.events(CHAT, {"messages": USER, "tools": TOOLS})
    found = [call for delta in deltas(events) for call in delta.get("tool_calls", [])]
    for index, name in enumerate("fg"):
        of_one = [call for call in found if call["index"] == index]
        head, *rest = of_one
        assert head["function"] == {"name": name, "arguments": ""} and head["type"] == "function"
        assert head["id"].startswith("call_") and all("id" not in call for call in rest)
        assert len(rest) > 5
        assert json.loads("".join(call["function"]["arguments"] for call in rest))["city"] == "Z\u00fcrich"
    assert "".join(delta.get("content", "") for delta in deltas(events)) == "Wait."
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    choice = server.chat(tools=TOOLS, max_tokens=200).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["f", "g"]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert (choice.message.content, choice.finish_reason) == ("Wait.", "tool_calls")


def test_without_leave_to_call_a_call_is_text_and_the_template_sees_no_tools(server: Served) -> None:
    """Rule 22."""
    server.engine.say(CALL, "<tool_call>\nbroken</tool_call>")
    choice = server.chat(tools=TOOLS, tool_choice="none").choices[0]
    assert choice.message.content == CALL and choice.message.tool_calls is None and choice.finish_reason == "stop"
    assert "[tools]" not in server.engine.tokenizer.decode(server.engine.asked[-1][0])
    choice = server.chat(tools=TOOLS).choices[0]
    assert "[tools]" in server.engine.tokenizer.decode(server.engine.asked[-1][0])
    assert choice.message.content == "<tool_call>\nbroken</tool_call>" and choice.finish_reason == "stop"


def test_a_call_that_is_cut_short_is_text(server: Served) -> None:
    """Rule 22."""
    server.engine.say(CALL)
    choice = server.chat(tools=TOOLS, max_tokens=20).choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert CALL.startswith(choice.message.content)


def test_only_one_call_comes_where_calls_must_not_be_parallel(server: Served) -> None:
    server.engine.say(CALL + CALL, CALL + CALL)
    choice = server.chat(tools=TOOLS, parallel_tool_calls=False, max_tokens=200).choices[0]
    assert len(choice.message.tool_calls) == 1 and choice.finish_reason == "tool_calls"
    events = server.events(CHAT, {"messages": USER, "tools": TOOLS, "parallel_tool_calls": False})
    assert {call["index"] for delta in deltas(events) for call in delta.get("tool_calls", [])} == {0}


def test_a_call_that_must_come_is_held_to_the_schema_of_its_arguments(server: Served) -> None:
    named = {"type": "function", "function": {"name": "g"}}
    server.engine.say('{"a": 1}', '[{"name": "f", "parameters": {"b": 2}}]')
    choice = server.chat(tools=TOOLS, tool_choice=named).choices[0]
    assert server.engine.asked[-1][1].grammar == {"json_schema": TOOLS[1]["function"]["parameters"]}
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments, choice.finish_reason) == ("g", '{"a": 1}', "tool_calls")
    choice = server.chat(tools=TOOLS, tool_choice="required").choices[0]
    schema = server.engine.asked[-1][1].grammar["json_schema"]
    assert [one["properties"]["name"]["const"] for one in schema["items"]["anyOf"]] == ["f", "g"]
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("f", '{"b": 2}')
    body = {"messages": USER, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}}
    assert "names 'h'" in server.post(CHAT, body).json()["error"]["message"]


def test_tools_need_a_template_and_a_parser_that_know_them() -> None:
    body = {"messages": USER, "tools": TOOLS, "max_tokens": 1}
    for template, words in ((TEMPLATE, "no parser for this model's tool calls"), ("<tool_call>", "no such variable")):
        with serving(FakeEngine(tokenizer(template))) as other:
            response = other.post(CHAT, body)
            assert response.status_code == 400 and words in response.json()["error"]["message"]
