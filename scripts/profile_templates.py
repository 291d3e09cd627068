"""Requests made from templates of our own, for tasks that the open routing data hardly has.

Every sentence here was written for this project. The wordings are many and the contents few: what is to be learned is
how people ask for a task, not what about.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Final

from appliance.core import Task

_SUBJECTS: Final = (
    "the history of tea", "night trains in Europe", "a small bakery", "honey bees", "volcanoes", "remote work",
    "the migration of swallows", "electric buses", "a lighthouse keeper", "sourdough bread", "solar eclipses",
    "our new office", "the city council's budget", "a lost suitcase", "gardening on a balcony", "chess openings",
    "a delayed delivery", "the water cycle", "public libraries", "a mountain hike", "recycling glass", "jazz",
)  # fmt: skip

_PASSAGES: Final = (
    "The harbour froze over in early January, and for three weeks the ferry could not leave. Islanders walked across "
    "the ice to buy bread. When the thaw came, the first ship brought mail for the whole month.",
    "Ms Ortega called on 14 March about order 88231. The blue kettle arrived with a cracked lid and she wants a new "
    "one sent to 5 Mill Lane before Friday.",
    "Our team moved the nightly backup from two to four in the morning because the old slot met the billing run. Since "
    "then no backup has failed, but the reports are ready an hour later.",
    "I love how light this jacket is, but the zip broke after two days and nobody answers my messages.",
    "The committee agreed to plant forty lime trees along the canal. Two members worried about the roots and asked for "
    "a survey. The work is to begin in autumn and to cost 32,000 euros.",
    "hey are we still on for tonight? bring the board game and some snacks, tom is coming too",
    "Invoice 2024-117 from Hartmann Tools, dated 2 May: three drills at 79.90 each, delivery 6.50, total 246.20.",
    "The new clinic opens in June. It has twelve rooms, a small laboratory and a garden. Patients will be able to book "
    "appointments online, and a bus will stop at the door every twenty minutes.",
    "Dr. Lin Wei of the Northfield Institute will speak in Geneva on 9 October about glaciers and drinking water.",
    "You have been chosen! Send your card number now to get a free phone, this offer ends at midnight.",
    "The engine makes a rattling noise when cold. I replaced the belt last year. It goes away after ten minutes.",
    "In the beginning the river was narrow, and one could cross it on stones. Then the mill was built, the banks were "
    "raised, and today only the old bridge shows where the ford once lay.",
)  # fmt: skip

_LABELS: Final = (
    "positive, negative, neutral", "spam, not spam", "billing, technical, sales, other", "urgent, normal, low",
    "sports, politics, science, culture", "complaint, question, praise", "yes, no", "bug, feature, question",
    "refund_request, address_change, lost_parcel, cancel_order, talk_to_person", "toxic, harmless",
)  # fmt: skip

_FIELDS: Final = (
    "name, date", "order_number, address", "company, total", "person, place, organisation", "price, currency",
    "sender, deadline, topic", "title, author, year", "product, quantity", "email, phone", "city, country",
)  # fmt: skip

_LANGUAGES: Final = (
    "French", "German", "Spanish", "Italian", "Portuguese", "Dutch", "Japanese", "Polish", "English", "Arabic",
)  # fmt: skip

_CODE: Final = (
    "def area(r):\n    return 3.14 * r * r",
    "for (let i = 0; i <= items.length; i++) {\n  total += items[i].price;\n}",
    "SELECT name, count(*) FROM orders WHERE paid = 1 GROUP BY name",
    'fn main() {\n    let words = vec!["a", "b"];\n    println!("{}", words[2]);\n}',
    "class Stack:\n    def __init__(self):\n        self.rows = []\n    def pop(self):\n        return self.rows[0]",
    "#!/bin/sh\nfor f in *.txt; do mv $f $f.bak; done",
)

_THINGS: Final = (
    "merges two sorted lists", "parses a date from a string", "removes duplicates but keeps the order",
    "counts the words in a file", "checks whether brackets are balanced", "resizes every picture in a folder",
    "finds the shortest path in a grid", "retries a request with growing pauses", "groups rows by month",
    "validates an IBAN", "rotates a matrix", "reads a CSV file and prints the sum of a column",
)  # fmt: skip

_PROGRAMMING: Final = ("Python", "JavaScript", "Rust", "SQL", "Go", "C++", "Bash", "TypeScript", "Java")

_PROBLEMS: Final = (
    "A train leaves at 8:15 and travels {a} km at {b} km/h. When does it arrive?",
    "Anna is {a} years old and her brother is {c} years younger. In {c} years, how old will they be together?",
    "A tank holds {a} litres and loses {c} litres an hour. After how many hours is it half empty?",
    "If {c} machines make {a} parts in an hour, how many parts do {b} machines make in {c} hours?",
    "Solve for x: {c}x + {b} = {a}",
    "What is the derivative of x^{c} + {b}x?",
    "A coin is thrown {c} times. What is the probability of exactly two heads?",
    "Show that the sum of two odd numbers is even.",
    "Three friends share a flat. Ben is not the cook, the cook is older than Cleo, and Ada is the youngest. Who cooks?",
    "A shop lowers a price of {a} euros by {c} percent and then raises it by {c} percent. What is the price now?",
    "Find the area of a triangle with sides {b}, {b} and {c}.",
    "Prove by induction that 1 + 2 + ... + n = n(n+1)/2.",
    "All bloops are razzies and some razzies are lazzies. Does it follow that some bloops are lazzies? Explain.",
    "Which number comes next: {c}, {b}, {a}, ...? Give your reasoning.",
    "How many different ways are there to seat {c} people around a table?",
    "Compute the determinant of [[{a}, {b}], [{c}, 1]].",
)  # fmt: skip

_CHATS: Final = (
    "Hi there!", "How are you today?", "Thanks, that was helpful.", "What is {s}?",
    "Can you tell me something about {s}?",
    "Who invented the zip?", "Why is the sky blue?", "What do you think of {s}?", "I feel a bit down today.",
    "When was the first railway opened?", "What should I cook tonight?", "Is it safe to eat raw rhubarb?",
    "What's the difference between a crow and a raven?", "Tell me more about that.",
    "Which is bigger, a whale or a bus?",
    "Where can I learn more about {s}?", "Do cats dream?", "What does 'serendipity' mean?",
    "Good morning, who are you?",
    "Which country has the most lakes?", "Should I buy or rent a flat?", "How long do tortoises live?",
    "Guten Morgen, was kannst du?", "Was weißt du über {s}?", "Qui a écrit Les Misérables ?",
    "¿Qué tiempo hace en Lima?",
    "Any tips for a first visit to Lisbon?", "Could you recommend a book about {s}?", "What causes tides?",
)  # fmt: skip

_CHOOSING: Final = (
    "Which of the following has to do with {s}?", "What matters most for {s}?", "Who would know about {s}?",
    "Which statement about {s} is true?", "Which of these was known first?", "The passage above is mainly about",
    "Which one does not fit with {s}?", "Experts on {s} agree that it is best compared with",
)  # fmt: skip

_WORDINGS: Final[Mapping[Task, tuple[str, ...]]] = {
    "classification": (
        "Classify the text as one of: {l}.\n\n{p}",
        "Which of these labels fits best: {l}?\nText: {p}",
        "{p}\n\nIs this {l}? Answer with one word.",
        "Assign one category from [{l}] to the message below.\nMessage: {p}\nCategory:",
        "You label customer messages. Labels: {l}. Reply with the label only.\n{p}",
        "Decide the sentiment of this review ({l}): {p}",
        "Pick exactly one tag for the following ticket.\nTags: {l}\nTicket: {p}\nTag:",
        "Return JSON with a single key label whose value is one of {l}.\n\n{p}",
        "Sort this into a class. The classes are {l}.\n---\n{p}",
        "What is the intent of this message? Options: {l}\n\n{p}",
        "Label: {l}\nInput: {p}\nOutput:",
        "Does the following belong to {l}? Choose one and say nothing else.\n{p}",
        "Ordne den Text einer Kategorie zu ({l}): {p}",
        "Classe ce message dans une de ces catégories : {l}.\n{p}",
        "Is the following message spam? Answer yes or no.\n{p}",
        "Rate the mood of this text as {l}.\n\n{p}",
        "Triage: choose between {l}.\n\n\"\"\"{p}\"\"\"",
    ),
    "extraction": (
        "Extract {f} from this text as JSON.\n\n{p}",
        "From the message below, pull out: {f}.\n\n{p}",
        "{p}\n\nList the {f} mentioned above.",
        "Fill this form from the text. Fields: {f}. Leave empty what is missing.\nText: {p}",
        "Find all names, dates and amounts in the following.\n{p}",
        "Return a JSON object with the keys {f}; null where the text does not say.\n---\n{p}",
        "Read the document and answer with a phrase copied from it.\nDocument: {p}\nQuestion: When did it happen?",
        "Quote the exact words of the passage that say who came.\nPassage: {p}",
        "Which people, places and organisations are named here? {p}",
        "Parse this into fields ({f}):\n{p}",
        "Tag every named entity in the sentence: {p}",
        "Get me the {f} out of this e-mail:\n{p}",
        "Extrahiere {f} aus dem folgenden Text: {p}",
        "Extrais {f} du texte suivant : {p}",
        "Context: {p}\nAnswer from the context only, with the shortest span: what was bought?",
        "Turn this note into a row of a table with the columns {f}.\n{p}",
    ),
    "summarisation": (
        "Summarise this in one sentence.\n\n{p} {q}",
        "Give me the gist of the following: {p} {q}",
        "tl;dr of this please\n{p} {q}",
        "{p} {q}\n\nSummarize the above in three bullet points.",
        "Write a short summary of the minutes below.\n{p} {q}",
        "What are the key points of this text?\n\n{p} {q}",
        "Shorten this to 20 words: {p}",
        "Condense the report into a paragraph for a busy reader.\n---\n{p} {q}",
        "Fasse den folgenden Text kurz zusammen: {p}",
        "Résume ce texte en deux phrases : {p}",
        "Resume el siguiente texto: {p}",
        "Boil this e-mail thread down to decisions and open questions:\n{p}\n{q}",
        "Make an abstract of this article.\n{p} {q}",
        "In a nutshell, what does this say? {p}",
    ),
    "translation": (
        "Translate into {g}: {p}",
        "Translate the following text to {g}.\n\n{p}",
        "How do you say \"{s}\" in {g}?",
        "{p}\n\nPut the above into {g}, please.",
        "Give me a {g} version of this message: {p}",
        "What is \"good luck with {s}\" in {g}?",
        "I need this in {g} for a customer:\n{p}",
        "You are a translator. Translate from English to {g} and keep the tone.\n{p}",
        "Übersetze ins Englische: Der Zug nach {s} hat heute leider Verspätung.",
        "Traduis en anglais : Nous arriverons demain matin à la gare.",
        "Traduce al inglés: La biblioteca cierra a las ocho.",
        "English to {g}: {p}",
    ),
    "generation": (
        "Write a poem about {s}.",
        "Write a short story that begins with {s}.",
        "Draft an e-mail to my landlord about {s}.",
        "Come up with five slogans for {s}.",
        "Compose a birthday message for a friend who loves {s}.",
        "Write a blog post of 300 words on {s}.",
        "Make this sound friendlier: {p}",
        "Rewrite the following in a formal tone.\n{p}",
        "Pretend you are a pirate and tell me about {s}.",
        "Invent a character who is obsessed with {s} and describe them.",
        "Give me ideas for a talk about {s}.",
        "Write a product description for {s}.",
        "Create a song about {s} in the style of a lullaby.",
        "Outline an essay on {s}.",
        "Schreibe ein Gedicht über {s}.",
        "Écris une courte histoire sur {s}.",
        "Play the part of a museum guide and welcome visitors to an exhibition about {s}.",
        "Write a polite refusal to an invitation about {s}.",
        "Suggest ten names for a newsletter about {s}.",
        "Compose a limerick on {s}",
    ),
    "code": (
        "Write a {k} function that {t}.",
        "Write a program in {k} which {t}.",
        "What is wrong with this code?\n```\n{c}\n```",
        "Explain what this does:\n{c}",
        "Refactor this: \n{c}",
        "{c}\nWhy does this throw an exception?",
        "Add unit tests for the following.\n```\n{c}\n```",
        "How do I write a script that {t} in {k}?",
        "Convert this to {k}:\n{c}",
        "I get an index error here, please fix it:\n{c}",
        "Implement a class in {k} that {t}; include type annotations.",
        "Write a regular expression that matches an ISO date, and show how to use it in {k}.",
        "Optimise this query, it is slow:\nSELECT * FROM a JOIN b ON a.id = b.a_id WHERE b.day > '2024-01-01'",
        "Schreibe eine Funktion in {k}, die {t}.",
        "How do I undo the last commit in git without losing my changes?",
        "Complete the function:\n{c}",
    ),
    "reasoning": (
        "{m}",
        "{m} Think step by step.",
        "{m}\nExplain how you got there.",
        "Solve this problem and put the result in a box.\n{m}",
        "Please help with my homework: {m}",
        "Rechne Schritt für Schritt: {m}",
    ),
    "chat": (
        "{h}",
        "{h}",
        "Question: {h}\nAnswer:",
        "{h} Keep it short.",
        "You are a helpful assistant.\n{h}",
        "{o}\nA. {s}\nB. {s}\nC. {s}\nD. {s}\nAnswer:",
        "{o}\n(a) {s}\n(b) {s}\n(c) {s}",
        "{p} {o}\nA) {s}\nB) {s}\nC) {s}\nD) none of them",
    ),
}  # fmt: skip


def made_requests(per_task: int, seed: int) -> Iterator[tuple[str, Task]]:
    """`per_task` requests for every task but tool use; the same for the same seed."""
    random_ = random.Random(seed)
    for task, wordings in _WORDINGS.items():
        for number in range(per_task):
            yield _filled(wordings[number % len(wordings)], random_), task


def _filled(wording: str, random_: random.Random) -> str:
    numbers = {"a": random_.randint(20, 900), "b": random_.randint(10, 90), "c": random_.randint(2, 12)}
    subject = random_.choice(_SUBJECTS)
    return wording.format(
        s=subject,
        p=random_.choice(_PASSAGES),
        q=random_.choice(_PASSAGES),
        l=random_.choice(_LABELS),
        f=random_.choice(_FIELDS),
        g=random_.choice(_LANGUAGES),
        c=random_.choice(_CODE),
        k=random_.choice(_PROGRAMMING),
        t=random_.choice(_THINGS),
        m=random_.choice(_PROBLEMS).format(**numbers),
        o=random_.choice(_CHOOSING).format(s=subject),
        h=random_.choice(_CHATS).format(s=subject),
    )
