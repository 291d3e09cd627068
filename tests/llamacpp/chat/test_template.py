"""Templates render as their authors meant, and a hostile one gets nowhere."""

import time
from typing import Any

import pytest

from appliance.errors import RequestError, Unsupported
from appliance.llamacpp.chat import template_sandbox
from appliance.llamacpp.chat.template import ChatTemplate

USER = {"role": "user", "content": "hi"}

CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def render(source: str, *messages: dict[str, Any], **more: Any) -> str:
    return ChatTemplate(source, bos_text="<s>", eos_text="</s>").render(messages or [USER], **more)


def test_a_conversation_ends_where_the_answer_begins() -> None:
    assert render(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, reply=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi</s>"),
        ("{%- if true %}\n    a\n{%- endif %}", "    a"),
        ("   {% if true %}\nb\n   {% endif %}\n", "b\n"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% continue %}{% endif %}{{ m }}{% endfor %}", "13"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% for m in 'abc' %}{{ loop.index }}{{ m }}{{ '.' if loop.last else '/' }}{% endfor %}", "1a/2b/3c."),
        ("{% for m in [1, 2] %}{{ loop.length }}{{ loop.previtem }}{% endfor %}", "22 1".replace(" ", "")),
        ("{% for m in [] %}x{% else %}none{% endfor %}", "none"),
        ("{% for k, v in {'a': 1}.items() %}{{ k ~ '=' ~ v }}{% endfor %}", "a=1"),
        ("{{ {'a': '<b> & é'} | tojson }}", '{"a": "<b> & é"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% set ns = namespace(n=0) %}{% for m in [1, 2] %}{% set ns.n = ns.n + m %}{% endfor %}{{ ns.n }}", "3"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(1) + m(2) }}", "[1][2]"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ 'x'.replace('x', 'y') }}{{ '  z ' | trim }}", "a+byz"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{{ [{'k': 'a'}, {'k': 'b'}] | map(attribute='k') | list | join(',') }}", "a,b"),
        ("{{ [{'k': 'a'}, {'k': 'b'}] | join('', attribute='k') }}", "ab"),
        ("{{ 7 % 4 }}{{ 2 * 3 }}{{ 'ab' * 2 }}{{ 2 ** 3 }}", "36abab8"),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":2,"b":1}'),
        ("{{ 'a{}b{x}'.format(1, x=2) }}", "a1b2"),
        ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
    ],
)
def test_a_template_may_use_what_published_templates_use(source: str, expected: str) -> None:
    assert render(source) == expected


def test_the_developer_is_the_system_where_the_template_knows_no_developer() -> None:
    developer = {"role": "developer", "content": "be brief"}
    assert "<|im_start|>system\nbe brief" in render(CHATML, developer, USER)
    assert render("{# developer #}{{ messages[0].role }}", developer) == "developer"


@pytest.mark.parametrize(
    "refuses", ["{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}", ""]
)
def test_instructions_reach_a_model_that_knows_no_system_role(refuses: str) -> None:
    source = refuses + "{% for m in messages if m.role != 'system' %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
    system = {"role": "system", "content": "be brief"}
    assert render(source, system, USER) == "[user: be brief\n\nhi]"
    assert render(source, {**system, "role": "developer"}, USER) == "[user: be brief\n\nhi]"


def test_tool_arguments_reach_the_template_as_objects() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    source = "{{ messages[0].tool_calls[0].function.arguments.a }}|{{ messages[0].content }}"
    assert render(source, said) == "1|"


def test_tools_are_refused_by_a_template_without_a_place_for_them() -> None:
    with pytest.raises(Unsupported, match="tools"):
        render(CHATML, USER, tools=[{"type": "function"}])
    with pytest.raises(Unsupported, match="tools"):
        render("{{ tools | length }}", USER, tools=[{"type": "function"}])  # looked at, but never shown to the model
    assert render("{{ tools[0].function.name }}", USER, tools=[{"function": {"name": "f"}}]) == "f"


def test_the_end_of_a_turn_is_what_the_template_writes_after_an_answer() -> None:
    assert ChatTemplate(CHATML).end_of_turn().strip() == "<|im_end|>"
    assert ChatTemplate("nothing of it").end_of_turn() == ""


def test_the_templates_own_complaint_is_passed_on() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__class__.__bases__[0] }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ '%s' % messages }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_cannot_reach_python_or_change_the_messages(source: str) -> None:
    messages = [dict(USER)]
    with pytest.raises(RequestError):
        ChatTemplate(source).render(messages)
    assert messages == [USER]


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ [0] * 10 ** 12 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'x'.ljust(10 ** 11) }}",
        "{{ 'x' | center(10 ** 11) }}",
        "{{ 'x' | indent('y' * 1000000) | indent('y' * 10000000) | indent('y' * 16000000) }}",
        "{{ '%099999999999d' % 1 }}",
        "{{ '{:99999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 99999999999) }}",
        "{{ ('{}' * 1000000).format('x' * 1000000) }}",
        "{{ '%0999999999d' | format(1) }}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}"
        "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('x', 'xxx') %}"
        "{% endfor %}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s | replace('x', 'xxx') %}"
        "{% endfor %}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s.join(['', '', '', '']) %}"
        "{% endfor %}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] | join %}"
        "{% endfor %}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    ],
)
def test_a_template_cannot_work_or_grow_without_end(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(RequestError):
        render(source)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'x' | no_such_filter }}", "{{", "{{ 1 | center(5) }}"])
def test_a_template_that_is_none_is_refused(source: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        render(source)


def test_a_template_that_fails_on_a_message_is_the_callers_error_not_a_crash() -> None:
    with pytest.raises(RequestError, match="fails on them"):
        render("{{ messages[0].content + 1 }}")
