"""What the patterns find and what they leave alone, as tables; and that no text makes them slow."""

import time

import pytest

from appliance.config.route_rules import STRUCTURED
from appliance.core import PersonalKind
from appliance.router.pii.patterns import PiiPatternDetector, find_personal_data, plain
from appliance.router.pii.text_extractor import CHUNK_CHARACTERS, extract_text, split_chunks

ALL: tuple[PersonalKind, ...] = (*STRUCTURED, "postal_address", "person_name")


def kinds(text: str) -> set[str]:
    return {span.kind for span in find_personal_data(plain(text), STRUCTURED)}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("email", "write to jane.doe+news@mail.example.co.uk, please"),
        ("email", "From:<Ulla@müller-söhne.de>"),
        ("phone", "call me at 555 0134 tomorrow"),
        ("phone", "(212) 555-0188"),
        ("phone", "+49 (0)30 901820"),
        ("phone", "Tel. 030 901820"),
        ("phone", "Phone:\n40 55 13 37"),
        ("phone", "+44 7700 900123"),
        ("phone", "+4477\u00a000\u2011900123"),
        ("phone", "my number is 020 7946 0958"),
        ("payment_card", "4111 1111 1111 1111"),
        ("payment_card", "4111-1111-1111-1111 12/27"),
        ("payment_card", "378282246310005"),
        ("payment_card", "my card 630495060000000000 was charged"),
        ("payment_card", "".join(chr(0xFF10 + int(digit)) for digit in "4111111111111111")),
        ("iban", "DE89 3704 0044 0532 0130 00"),
        ("iban", "pay to gb29nwbk60161331926819 please"),
        ("iban", "MT84MALT011000012345MTLCAST001S"),
        ("bic", "SWIFT: DEUTDEFF500"),
        ("national_id", "123-45-6789"),
        ("national_id", '{"ssn": "123456789"}'),
        ("national_id", "NHS number 943 476 5870"),
        ("national_id", "her NI number is QQ 12 34 56 C".replace("QQ", "AB")),
        ("national_id", "AB123456C"),
        ("national_id", "Steuer-ID: 36 574 261 809"),
        ("national_id", "295109912611193"),
        ("national_id", "54362315K"),
        ("national_id", "X2482300W"),
        ("national_id", "RCCMNL83S18D969H"),
        ("national_id", "BSN 111222333"),
        ("national_id", "390.533.447-05"),
        ("national_id", "16.727.230/0001-97"),
        ("national_id", "Aadhaar: 2341 2341 2346"),
        ("national_id", "ACUPA7085R"),
        ("national_id", "TFN 123 456 782"),
        ("national_id", "social insurance 123-456-782"),
        ("national_id", "PESEL 44051401359"),
        ("national_id", "131052-308T"),
        ("national_id", "971013-9019902"),
        ("national_id", "756.9217.0769.85"),
        ("national_id", "rijksregisternummer 85.07.30-033.28"),
        ("national_id", "personnummer 880320-0016"),
        ("national_id", "kimlik no 17291716060"),
        ("national_id", "ID number 7503305044089"),
        ("national_id", "PPS no. 6433435F"),
        ("national_id", "360426199101010071"),
        ("national_id", "BOXW310820HNERXN09"),
        ("passport", "passport no. C01X00T47"),
        ("driver_license", "my driver's license number is D1234567"),
        ("driver_license", "MORGA753116SM9IJ"),
        ("medical_record", "patient ID: L1622537"),
        ("medical_record", "see MRN-643734"),
        ("date_of_birth", "born on 3 March 1984"),
        ("date_of_birth", "DOB: 03/04/1984"),
        ("ip_address", "logged in from 86.121.97.248 again"),
        ("ip_address", "from 2a02:8071:b5c4:9a00:1c2d:3e4f:5a6b:7c8d"),
        ("mac_address", "00:1B:44:11:3A:B7"),
        ("mac_address", "ca-fe-ba-be-fe-ed"),
        ("crypto_wallet", "1BoatSLRHtKNngkdXEeobR76b53LETtpyT"),
        ("crypto_wallet", "0x52908400098527886E0F7030069857D2E4169EE7"),
        ("credentials", "postgres://app:s3cret@db.internal/orders"),
        ("credentials", 'password = "hunter2!"'),
        ("credentials", "Authorization: Bearer token: abc123def456"),
        ("credentials", "AKIAIOSFODNN7EXAMPLE"),
        ("credentials", "sk-proj-abcdefghijklmnop1234567890"),
        ("credentials", "-----BEGIN RSA PRIVATE KEY-----"),
    ],
)  # fmt: skip
def test_what_has_a_form_of_its_own_is_found(kind: str, text: str) -> None:
    assert kind in kinds(text), kinds(text)


@pytest.mark.parametrize(
    "text",
    [
        "It cost $1,234,567.89 in 1998, and 1,000,000 people came.",
        "The meeting is on 2024-05-16 at 11:34:35, or 16/05/2024.",
        "Numbers: 3 4 5 6 7 8 9 10 11 12 13",
        "pi is 3.14159265358979323846264338327950288419716939937510",
        "order 4111111111111112 was shipped",
        "1111111111111111",
        "Use version 1.2.3.4 of the firmware",
        "connect to 127.0.0.1 or 192.168.1.10 or ::1",
        "std::vector<int> a::b(1); x = y[1:2:3]",
        "user@localhost and @handle and a @ b",
        "My passcode is not being accepted. My password is incorrect.",
        "password: str = getpass()",
        "What is a passport? When was the NHS founded, 1948?",
        "The driver's license law of 1903",
        "def f(x): return x ** 10 + 123456",
        "ISBN 978-3-16-148410-0",
        "GB82 WEST 1234 5698 7654 33",
        "DE89 3704 0044 0532 0130 01",
        "Isaac Newton was born on 25 December 1642",
        "https://example.com/path?a=1&b=2",
        "git commit 8e8239b289788e7aa8a8357cc7298fcf4664e07a",
        "uuid 123e4567-e89b-12d3-a456-426614174000",
        "1969 1972 1984 1999 2003 2010",
        "The token is a unit of text; the secret is to begin.",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert kinds(text) == set()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("postal_address", "I live at 221 Baker Street, London"),
        ("postal_address", "Hauptstraße 12"),
        ("postal_address", "12 rue de la Paix"),
        ("postal_address", "P.O. Box 1234"),
        ("person_name", "Please ask Dr. Jane Smith"),
        ("person_name", "my name is Łukasz Nowak"),
    ],
)
def test_addresses_and_names_are_looked_for_only_when_asked_for(kind: str, text: str) -> None:
    assert kind in {span.kind for span in find_personal_data(text, ALL)}
    assert kind not in kinds(text)


def test_only_the_kinds_that_were_asked_for_are_told() -> None:
    text = "jane@example.com, 4111 1111 1111 1111, +44 7700 900123"
    wanted: tuple[PersonalKind, ...] = ("phone", "email")
    assert PiiPatternDetector(wanted).kinds_in(text) == wanted
    others: tuple[PersonalKind, ...] = ("iban",)
    assert PiiPatternDetector(others).kinds_in(text) == ()


HOSTILE = (
    "12-34 567 ",
    "@",
    "a@",
    "a.",
    "1",
    "+(",
    "GB82",
    "DE89 3704 ",
    "passport ",
    "ssn 12345678 ",
    "1 ",
    "0-",
    ":a",
    "a:b@",
    "eyJ",
    "password=",
    "born 1/1/",
    "12 Baker ",
    "Dr. A",
    "1.2.3.",
    "\u00e9\u2011",
    "\u0130ssn ",
    "sk-",
)


@pytest.mark.parametrize("piece", HOSTILE)
def test_no_repetition_makes_the_search_slow(piece: str) -> None:
    """Twice the text takes about twice the time; a pattern that tries everything would take four times or more."""
    detector = PiiPatternDetector(ALL)

    def seconds(characters: int) -> float:
        text = (piece * characters)[:characters]
        taken = []
        for _ in range(3):
            started = time.thread_time()
            detector.kinds_in(text)
            taken.append(time.thread_time() - started)
        return min(taken)

    short, long = seconds(CHUNK_CHARACTERS // 4), seconds(CHUNK_CHARACTERS)
    assert long < 0.25, f"{long:.3f} s for one chunk"
    assert long < 8 * short + 0.02, f"{short:.4f} s, then {long:.4f} s for four times as much"


@pytest.mark.parametrize("zero", [0x0660, 0xFF10, 0x1D7CE, 0x1D7F6])
def test_digits_of_another_alphabet_hide_no_number(zero: int) -> None:
    written = "".join(chr(zero + int(digit)) for digit in "4111111111111111")
    assert kinds(f"card {written}") == {"payment_card"}


def test_chunks_overlap_so_that_nothing_is_cut_in_two() -> None:
    text = ("word " * 4000)[: CHUNK_CHARACTERS - 9] + " 4111 1111 1111 1111 " + "word " * 8000
    found = [piece for piece in split_chunks(text) if PiiPatternDetector(STRUCTURED).kinds_in(piece)]
    assert found
    assert all(len(piece) <= CHUNK_CHARACTERS for piece in split_chunks(text))
    assert "".join(split_chunks("short")) == "short"
    assert len(list(split_chunks("x" * 1_000_000))) < 70


def test_everything_in_a_body_is_read_names_of_fields_and_unknown_fields_included() -> None:
    body = {
        "model": "auto",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "again"}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "calls jane@example.com"}}],
        "response_format": {"json_schema": {"schema": {"properties": {"x": {"description": "of +44 7700 900123"}}}}},
        "questions": {"q": {"criteria": {"option of 4111 1111 1111 1111": None}}},
        "user": "DE89370400440532013000",
        "metadata": {"ssn": 123456789},
    }
    read = extract_text(body)
    assert read is not None
    assert read.attachments == 0
    assert "ssn: 123456789" in read.text
    assert kinds(read.text) == {"email", "phone", "payment_card", "iban", "national_id"}
    assert extract_text(body, limit_characters=100) is None


def test_attachments_are_counted_and_not_searched() -> None:
    pixels = "data:image/png;base64," + "A" * 1000
    parts = [
        {"type": "image_url", "image_url": {"url": pixels}},
        {"type": "input_audio", "input_audio": {"data": "AAAA"}},
        {"type": "text", "text": "what is this?"},
    ]
    read = extract_text({"messages": [{"role": "user", "content": parts}], "other": {"picture": pixels}})
    assert read is not None
    assert read.attachments == 3
    assert "AAAA" not in read.text
    assert "what is this?" in read.text
