"""What words and phrases say of the task. Data for the rules; compiled once.

A cue is found when one of its own words is in the text, or when one of its gate words is and then its pattern matches:
the gate keeps most patterns from ever being run.
"""

import re
from dataclasses import dataclass
from typing import Final

from appliance.core import Task
from appliance.router.profile.text_sample import TextSample


@dataclass(frozen=True, slots=True)
class KeywordFeature:
    task: Task
    name: str
    words: frozenset[str]
    gate: frozenset[str]
    pattern: re.Pattern[str]
    mark: str = ""
    """Opens the gate too; for what is no word."""
    edges_only: bool = False
    """Whether only the beginning and the end count: in the middle of a passage the same words mean nothing."""

    def is_in(self, sample: TextSample) -> bool:
        vocabulary = sample.edge_vocabulary if self.edges_only else sample.vocabulary
        if not self.words.isdisjoint(vocabulary):
            return True
        if self.gate and self.gate.isdisjoint(vocabulary) and (not self.mark or self.mark not in sample.text):
            return False
        return self.pattern.search(sample.edges if self.edges_only else sample.text) is not None


def _cue(
    task: Task, name: str, words: str, gate: str, pattern: str, *, mark: str = "", edges_only: bool = False
) -> KeywordFeature:
    compiled = re.compile(pattern, re.VERBOSE)
    return KeywordFeature(task, name, frozenset(words.split()), frozenset(gate.split()), compiled, mark, edges_only)


CUES: Final = (
    _cue(
        "classification",
        "asks for one label of a set",
        "classify categorize categorise classifier klassifiziere triage",
        "labels label categories category classes class intents intent topics sentiment spam positive",
        r"""(?:allowed|possible|valid|candidate)\ (?:labels?|classes|categories|intents)
          | exactly\ one\ (?:label|class|category|word)
          | one\ of\ (?:the\ following|these)\ (?:labels|classes|categories|intents|topics)
          | (?:which|what)\ (?:category|label|intent|sentiment)
          | (?:what\ is\ the|detect|determine\ the|analy[sz]e\ the)\ (?:sentiment|intent)
          | spam\ or\ (?:ham|not) | positive\ or\ negative | positive,\ negative
          | label\ (?:the|this|each|these)\ """,
    ),
    _cue(
        "translation",
        "asks for a translation",
        "translate translation übersetze übersetzen traduis traduire traduce traducir traduci vertaal",
        "french german spanish italian portuguese dutch chinese japanese korean russian arabic english",
        r"""^(?:say|write|put)\ .{1,400}\ (?:in|into)[ ]
            (?:french|german|spanish|italian|portuguese|dutch|chinese|japanese|korean)\W*$""",
        edges_only=True,
    ),
    _cue(
        "extraction",
        "asks for fields or a span of a given text",
        "extract extracting extrahiere",
        "span copied json entities names dates",
        r"""(?:copied|quoted?|span)\ from\ the\ (?:passage|text|document|context)
          | (?:shortest|exact)\ (?:span|phrase)
          | (?:pull\ out|find\ all|list\ all)\ (?:the\ )?(?:names?|dates|entities|addresses|amounts|emails|fields)
          | named\ entities
          | json\b.{0,80}\b(?:keys|fields|only)""",
        edges_only=True,
    ),
    _cue(
        "code",
        "has code or asks for it",
        "leetcode traceback segfault stacktrace dijkstra fibonacci",
        "function program script code query regex algorithm website api c++ python javascript java html sql css rust "
        "def #include select import class assert golang typescript bash debug refactor array arrays tree",
        r"""```
          | \b(?:write|create|implement|develop|define|complete|fix|debug|refactor|optimi[sz]e|modify)\b[^.\n]{0,40}
            \b(?:function|program|script|method|code|query|regex|algorithm|website|api|unit\ tests?|c\+\+)(?!\w)
          | \b(?:python|javascript|typescript|java|c\+\+|c\#|golang|rust|bash|html|css|sql)\ (?:\w+\ )?
            (?:function|program|script|code|query|snippet|class)
          | \bdef\ \w+\( | \#include\ *< | \bpublic\ static\b | ^import\ \w+$ | \bselect\ .{1,80}\ from\ \w
          | \bassert\ \w+\( | time\ complexity | null\ ?pointer | compile\ error
          | binary\ (?:search\ )?tree | linked\ list | sorted\ arrays? | dynamic\ programming""",
        mark="```",
    ),
    _cue(
        "summarisation",
        "asks for a summary",
        "summarize summarise summarizing summarising summary summarization summarisation tldr tl;dr zusammenfassung "
        "condense résumé resumen",
        "key nutshell fasse",
        r"key\ (?:points|takeaways) | in\ a\ nutshell | fasse\ .{1,60}\ zusammen",
        edges_only=True,
    ),
    _cue(
        "reasoning",
        "mathematics or reasoning",
        "prove proof theorem lemma derive solve integral derivative equation equations polynomial probability "
        "remainder calculate compute riddle puzzle paradox deduce enthalpy isomers molecule eigenvalue wavelength "
        "hamiltonian nmr",
        "",
        r"""\\(?:boxed|frac|sqrt|sum|int|begin|pi|cdot)\b | \$[^$\n]{1,80}[\\^_=+]
          | step[ -]by[ -]step | chain\ of\ thought | careful\ thought | think\ (?:carefully|through)
          | how\ (?:many|much|far|tall|fast)\b.{0,200}\?\W*$
          | (?:find|what\ is|determine)\ the\ (?:\w+\ ){0,3}
            (?:value|number|area|sum|product|volume|length|radius|angle|ratio|median|average)\ of
          | \b[a-z]\ ?[+*/^-]\ ?[a-z]\ ?=\ | \bf\(x\)
          | which\ of\ the\ following | what\ could\ be\ the\ reasons? | does\ not\ belong""",
        edges_only=True,
    ),
    _cue(
        "generation",
        "asks to write something",
        "compose draft craft rewrite rephrase brainstorm essay poem haiku limerick slogan roleplay",
        "write create generate imagine pretend act describe outline discuss compare edit",
        r"""(?:^|\n|[.:!?]\ )(?:please\ |can\ you\ |could\ you\ )?
            (?:write|create|generate|imagine|pretend|act\ as|describe|outline|discuss|compare|edit)\b""",
        edges_only=True,
    ),
)

_CHOICES: Final = re.compile(r"^[ \t]*\(?a[.):][ \t]\S.*\n+[ \t]*\(?b[.):][ \t]\S", re.MULTILINE)

_PROBLEM_WORDS: Final = 250
_PROBLEM_NUMBERS: Final = 3
_NUMBER_WORDS = """
one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand dozen half
third quarter twice double triple percent"""
_NUMBERS: Final = frozenset(_NUMBER_WORDS.split())


def has_choices(sample: TextSample) -> bool:
    """A question with lettered answers, each on a line of its own: it asks for knowledge, whatever its words."""
    return _CHOICES.search(sample.text) is not None


def is_word_problem(sample: TextSample) -> bool:
    """A short text with several numbers, in digits or words, and a question at its end."""
    if len(sample.words) > _PROBLEM_WORDS or "?" not in sample.text[-80:]:
        return False
    return sum(word in _NUMBERS or any(map(str.isdigit, word)) for word in sample.words) >= _PROBLEM_NUMBERS


_DEMANDING = """
prove derive theorem rigorous optimal trade-off trade-offs architecture algorithm complexity concurrency concurrent
analyze analyse evaluate critique justify implications strategy multi-step step-by-step comprehensive detailed thorough
in-depth hypothesis optimize optimise"""
_CONSTRAINING = (
    "must should exactly ensure unless constraint constraints requirement requirements only least most without"
)
_STEPPING = "first then next finally second secondly third thirdly lastly afterwards"

DEMANDING: Final = frozenset(_DEMANDING.split())
CONSTRAINING: Final = frozenset(_CONSTRAINING.split())
STEPPING: Final = frozenset(_STEPPING.split())
