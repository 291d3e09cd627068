"""What of a chat request is about tools and reasoning: is it possible here, and how are the replies held and read."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from appliance.errors import Unsupported
from appliance.llamacpp.chat.prompts import PromptBuilder
from appliance.llamacpp.chat.reply_format import ReplyFormat
from appliance.llamacpp.decode.generation import GenerationRequest
from appliance.llamacpp.server.request_models import ChatIn
from appliance.llamacpp.tools.formats import THINKING
from appliance.llamacpp.tools.grammar import ReplyGrammarSpec
from appliance.llamacpp.tools.offered import OfferedTools
from appliance.llamacpp.tools.reading import ReplySyntaxes

_SWITCH: Final = "enable_thinking"
_OWN_VARIABLES: Final = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


def check_can_call(prompts: PromptBuilder) -> None:
    """Raises Unsupported where the model was not taught to call tools in a way that can be read."""
    if prompts.style.tools is not None:
        return
    template = prompts.template
    if template is not None and template.abilities.tools:
        why = "this model writes tool calls in a form that is not known here"
    else:
        why = "this model's chat template has no place for tools"
    raise Unsupported(f"tools: {why}; leave them out, or ask a model with the ability tools", param="tools")


def variables_of(call: ChatIn, prompts: PromptBuilder) -> Mapping[str, Any]:
    """What the template is told besides the messages. Raises Unsupported where it would not listen."""
    variables: dict[str, Any] = {}
    effort, template, style = call.reasoning_effort, prompts.template, prompts.style
    if effort is not None and effort != "none" and style.reasoning is None:
        raise Unsupported(
            f"reasoning_effort: {effort!r}: this model does not reason before it answers; leave it out, or ask a model "
            "with the ability reasoning",
            param="reasoning_effort",
        )
    if effort is not None and template is not None:
        if template.abilities.effort:
            variables["reasoning_effort"] = effort
        if template.abilities.switch:
            variables[_SWITCH] = effort != "none"
    elif wants_json(call) and template is not None and template.abilities.switch:
        # Thinking first may take all of a reply's length; who wants it says so by reasoning_effort.
        variables[_SWITCH] = False
    for name, value in (call.chat_template_kwargs or {}).items():
        known = template is not None and name not in _OWN_VARIABLES and template.knows(name)
        if not known and not (name == _SWITCH and value is False and style.reasoning is None):
            place = f"chat_template_kwargs.{name}"
            raise Unsupported(f"{place[:120]}: this model's chat template does not know it; leave it out", param=place)
        variables[name] = value
    return variables


def wants_json(call: ChatIn) -> bool:
    return call.response_format is not None and call.response_format.type != "text"


def as_message(
    ask: GenerationRequest, style: ReplyFormat, offered: OfferedTools | None, prompt: str, *, thinks: bool
) -> GenerationRequest:
    """The call with what its replies are held to and read by; unchanged where they can be text alone.

    `thinks`: the caller wants thoughts, also before JSON.
    """
    if offered is None and style.reasoning is None:
        return ask
    opened = _thinking_open(style, prompt)
    tools = style.tools if offered is not None else None
    rules = None
    if offered is not None or (ask.schema is not None and (opened or thinks or style.reasoning == "harmony")):
        rules = ReplyGrammarSpec(offered, tools, ask.schema, style.reasoning, opened, style.specials)
    read_as = ReplySyntaxes(
        tools=tools,
        reasoning=style.reasoning,
        thinking_open=opened,
        schemas=offered.schemas if offered is not None else {},
        shown=style.shown,
    )
    return replace(ask, rules=rules, read_as=read_as)


def _thinking_open(style: ReplyFormat, prompt: str) -> bool:
    """Some templates write the opening marker themselves."""
    if style.reasoning is None or style.reasoning == "harmony":
        return False
    return prompt.rstrip().endswith(THINKING[style.reasoning][0])
